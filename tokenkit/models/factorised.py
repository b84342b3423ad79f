"""Likelihood of millions of ids by parts: what kind of id, then which one, or digit after digit of a code.

p(id) = p(type | h) p(id | type, h). Special tokens, bytes and pins go through the rows of an ordinary head, each kind
by itself. A code is one more of its chunk or the last one, and p(code) the product of p(digit | h, type, those before).
The sum over all ids is 1, so bits per byte are comparable with any model's. Inputs are sums of small tables likewise.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from tokenkit.config import Config, UserError, resolved
from tokenkit.models.latents import places, smooth_table
from tokenkit.quantities import at_least_float32
from tokenkit.scores import PLAIN, LogitForm, token_scores
from tokenkit.tokenizers.autoencoder.codec import Codec
from tokenkit.tokenizers.autoencoder.ids import IdLayout
from tokenkit.tokenizers.autoencoder.quantizer import DigitOrder, FSQLayer
from tokenkit.tokenizers.whole_file import write_whole

SPECIAL, BYTE, PIN, MORE, LAST = range(5)
MOST_LISTED = 1 << 17  # ids of which every log-probability may be asked for at once


class OpenShape(Config):
    """Which ids there are: special tokens, bytes, pins, and codes that more follow or that are the last of a chunk."""

    first_regular_id: int
    num_pins: int
    levels: tuple[int, ...]
    digit_order: DigitOrder
    min_groups: int
    groups: int

    @classmethod
    def of(cls, codec: Codec) -> "OpenShape":
        """That of a tokenizer; UserError for one without codes."""
        if codec.open_codes is None:
            raise UserError("factorised tables: this tokenizer has no codes, so a row for every id is all it needs")
        network, layout = codec.open_codes.network, codec.layout
        return cls(
            first_regular_id=layout.first_regular_id,
            num_pins=layout.num_pins,
            levels=tuple(network.quantizer.levels),
            digit_order=network.quantizer.digit_order,
            min_groups=network.config.min_groups,
            groups=network.config.groups,
        )

    @property
    def layout(self) -> IdLayout:
        """The ids in order."""
        return IdLayout(self.num_pins, FSQLayer(self.levels, "S").total_vocab_size, self.first_regular_id)


class Factorised(nn.Module):
    """The tables of codes, at the inputs and at the outputs, and what decides between kinds of ids."""

    def __init__(self, shape: OpenShape, width: int, *, std: float = 0.02, seed: int = 0) -> None:
        """`std` is the root mean square that input vectors of codes begin with."""
        super().__init__()
        self.shape, self.layout = shape, shape.layout
        self.quantizer = FSQLayer(shape.levels, "S", digit_order=shape.digit_order)
        self.types, self.enter = nn.Linear(width, 5), nn.Linear(width, width)
        self.leave = nn.Linear(width, sum(shape.levels))
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.types, self.enter, self.leave):
            nn.init.normal_(layer.weight, std=0.5 * width**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        parts = (len(shape.levels) + 1) ** 0.5  # vectors that are added up
        # Two rows for `more` and `last`, then those of the digits. Inputs of close digits begin alike.
        self.inputs = nn.Parameter(_tables(shape.levels, width, generator) * (std / parts))
        self.told = nn.Parameter(_tables(shape.levels, width, generator) / parts)
        own = torch.arange(len(shape.levels)).repeat_interleave(torch.tensor(shape.levels))
        self.register_buffer("_own", own == torch.arange(len(shape.levels)).unsqueeze(1), persistent=False)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The ids of special tokens, of bytes and of pins, as rows of the head."""
        layout = self.layout
        return [(0, layout.byte_base), (layout.byte_base, layout.pin_base), (layout.pin_base, layout.open_base)]

    def type_of(self, ids: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """The kind of every id."""
        layout = self.layout
        borders = [layout.byte_base, layout.pin_base, layout.open_base, layout.open_base + layout.num_codes]
        return torch.bucketize(ids, torch.tensor(borders, device=ids.device), right=True)

    def embed(self, embedding: nn.Module, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Input vectors: the embedding's row, or the sum of a code's digits and of whether more codes follow."""
        is_code = ids >= self.layout.open_base
        found = embedding(ids.masked_fill(is_code, 0))
        if not is_code.any():
            return found
        last, digits = self._read(ids[is_code])
        vectors = self.inputs[last] + self.inputs[self._rows(digits)].sum(1)
        return found.masked_scatter(is_code.unsqueeze(-1), vectors.to(found.dtype))

    def label_logp(
        self,
        hidden: Float[Tensor, "*n D"],
        head: Float[Tensor, "R D"],
        labels: Int[Tensor, "*n"],
        form: LogitForm = PLAIN,
    ) -> Float[Tensor, "*n"]:
        """Log-probability of each label, in nats; a label below 0 is scored 0. No vocabulary is ever held."""
        states, ids = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        scored = ids >= 0
        states, ids = states[scored], ids[scored]
        kinds = self.type_of(ids)
        logp = self._type_logp(states).gather(1, kinds.unsqueeze(1)).squeeze(1)
        for kind, (low, high) in enumerate(self.ranges):
            at = kinds == kind
            if at.any():
                part = _part(form, low, high)
                own, _ = token_scores(states[at], head[low:high], ids[at] - low, None, part)
                logp = logp.masked_scatter(at, logp[at] + own.to(logp.dtype))
        at = kinds >= MORE
        if at.any():
            own = self._digit_logp(states[at], *self._read(ids[at]))
            logp = logp.masked_scatter(at, logp[at] + own.to(logp.dtype))
        return torch.zeros_like(scored, dtype=logp.dtype).masked_scatter(scored, logp).view(labels.shape)

    def listed(
        self, hidden: Float[Tensor, "*n D"], head: Float[Tensor, "R D"], form: LogitForm = PLAIN
    ) -> Float[Tensor, "*n V"]:
        """Log-probability of every id, for small grids; UserError for a large one."""
        size = self.layout.vocab_size
        if size > MOST_LISTED:
            raise UserError(f"logits of {size:,} ids at once are too many; ask for label_logp, or sample")
        states = hidden.reshape(-1, hidden.shape[-1])
        kinds = self._type_logp(states)
        parts = [
            at_least_float32(_part(form, low, high)(states @ head[low:high].to(states.dtype).T)).log_softmax(-1)
            + kinds[:, kind, None]
            for kind, (low, high) in enumerate(self.ranges)
        ]
        codes = torch.arange(self.layout.open_base, size, device=states.device)
        last, digits = self._read(codes)
        rows = [self._digit_logp(state.expand(len(codes), -1), last, digits) for state in states]
        parts.append(torch.stack(rows) + kinds[:, MORE:].repeat_interleave(self.layout.num_codes, 1))
        return torch.cat(parts, 1).view(*hidden.shape[:-1], size)

    @torch.no_grad()
    def sample(
        self,
        hidden: Float[Tensor, "B D"],
        head: Float[Tensor, "R D"],
        form: LogitForm = PLAIN,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        run: Int[Tensor, "B"] | None = None,
    ) -> Int[Tensor, "B"]:
        """An id per row, drawn type first and then part by part; `temperature` and `top_p` hold for every part.

        At temperature 0 the likeliest of: special token, byte, pin, and a code of likeliest digits of either type.
        `run` is how many codes of a chunk a row has already; with it only runs come out that a chunk can have.
        """
        kinds = self._type_logp(hidden)
        if run is not None:
            kinds = kinds.masked_fill(~self._may_follow(run), -torch.inf)
        if temperature > 0:
            drawn = _draw(kinds, temperature, top_p)
        else:
            found = [self._of_type(hidden, head, form, kind, 0.0, 1.0) for kind in range(5)]
            drawn = (kinds + torch.stack([logp for _, logp in found], 1)).argmax(1)
            return torch.stack([ids for ids, _ in found], 1).gather(1, drawn.unsqueeze(1)).squeeze(1)
        ids = torch.zeros_like(drawn)
        for kind in drawn.unique().tolist():
            at = drawn == kind
            ids[at] = self._of_type(hidden[at], head, form, kind, temperature, top_p)[0]
        return ids

    def _of_type(
        self, hidden: Tensor, head: Tensor, form: LogitForm, kind: int, temperature: float, top_p: float
    ) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
        """An id of one kind per row, and its log-probability given that kind; -inf where there is none."""
        if kind < MORE:
            low, high = self.ranges[kind]
            if low == high:
                return torch.zeros_like(hidden[:, 0]).long(), torch.full_like(hidden[:, 0], -torch.inf)
            logits = at_least_float32(_part(form, low, high)(hidden @ head[low:high].to(hidden.dtype).T))
            place = _draw(logits, temperature, top_p)
            return low + place, logits.log_softmax(-1).gather(1, place.unsqueeze(1)).squeeze(1)
        last = torch.full_like(hidden[:, 0], kind - MORE).long()
        context, digits, total = hidden + self.told[last], [], 0.0
        begin = 0
        for level in self.shape.levels:
            logits = at_least_float32(self._logits(context)[:, begin : begin + level])
            digit = _draw(logits, temperature, top_p)
            total = total + logits.log_softmax(-1).gather(1, digit.unsqueeze(1)).squeeze(1)
            context = context + self.told[2 + begin + digit]
            digits.append(digit)
            begin += level
        code = self.quantizer.code_to_token_id(torch.stack(digits, 1))
        assert isinstance(total, Tensor)
        return self.layout.open_base + last * self.layout.num_codes + code, total

    def _may_follow(self, run: Int[Tensor, "B"]) -> Bool[Tensor, "B 5"]:
        """The kinds of ids that a row may go on with: a run of codes has min_groups .. groups, the last one marked."""
        outside, left = run == 0, run + 1 < self.shape.groups
        ends = run + 1 >= self.shape.min_groups
        return torch.stack([outside, outside, outside, left, ends], 1)

    def _type_logp(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "N 5"]:
        logits = at_least_float32(self.types(states))
        missing = torch.tensor([high == low for low, high in self.ranges] + [False, False], device=states.device)
        return logits.masked_fill(missing, -torch.inf).log_softmax(-1)

    def _digit_logp(
        self, states: Float[Tensor, "N D"], last: Int[Tensor, "N"], digits: Int[Tensor, "N d"]
    ) -> Float[Tensor, "N"]:
        """Log-probability of all digits of a code, given its type."""
        rows = self._rows(digits)
        before = self.told[rows].cumsum(1)[:, :-1]
        begun = (states + self.told[last].to(states.dtype)).unsqueeze(1)
        contexts = torch.cat([begun, begun + before.to(states.dtype)], 1)
        logits = at_least_float32(self._logits(contexts)).masked_fill(~self._own, -torch.inf)
        return logits.log_softmax(-1).gather(-1, (rows - 2).unsqueeze(-1)).squeeze(-1).sum(-1)

    def _logits(self, contexts: Float[Tensor, "*n D"]) -> Float[Tensor, "*n L"]:
        return self.leave(F.gelu(self.enter(contexts)))

    def _read(self, ids: Int[Tensor, "N"]) -> tuple[Int[Tensor, "N"], Int[Tensor, "N d"]]:
        """Whether each code is the last of its chunk, and its digits."""
        past = ids - self.layout.open_base
        codes = self.layout.num_codes
        return past // codes, self.quantizer.token_id_to_code(past % codes)

    def _rows(self, digits: Int[Tensor, "N d"]) -> Int[Tensor, "N d"]:
        return 2 + places(digits, self.shape.levels)

    def save(self, path: Path, dtype: torch.dtype | None = None) -> None:
        """Writes tables and shape as one safetensors file."""
        tensors = {
            name: tensor.detach().cpu().to(dtype or tensor.dtype).contiguous()
            for name, tensor in self.state_dict().items()
        }
        write_whole(path, save(tensors, {"shape": json.dumps(resolved(self.shape))}))

    @classmethod
    def load(cls, path: Path) -> "Factorised":
        """What `save` wrote; UserError for another file."""
        try:
            with safe_open(path, "pt") as file:
                shape = OpenShape.model_validate_json((file.metadata() or {})["shape"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            found = cls(shape, tensors["inputs"].shape[1])
            found.to(tensors["inputs"].dtype).load_state_dict(tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: no factorised tables ({str(error).splitlines()[0]})") from None
        return found


def _tables(levels: Sequence[int], width: int, generator: torch.Generator) -> Float[Tensor, "L D"]:
    """Unit-normal entries: a row each for `more` and `last`, then the smooth tables of the digits."""
    kinds = torch.randn(2, width, generator=generator)
    return torch.cat([kinds, *(smooth_table(level, width, generator) for level in levels)])


def _part(form: LogitForm, low: int, high: int) -> LogitForm:
    """The form of some rows' logits."""
    return LogitForm(None if form.bias is None else form.bias[low:high], form.scale, form.softcap)


def _draw(logits: Float[Tensor, "B N"], temperature: float, top_p: float) -> Int[Tensor, "B"]:
    """A place per row; the likeliest at temperature 0."""
    if temperature == 0:
        return logits.argmax(-1)
    chances = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, places_ = chances.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        chances = chances.scatter(-1, places_, ordered.masked_fill(beyond, 0.0))
    return torch.multinomial(chances, 1).squeeze(-1)
