"""Models in lockstep over tokens: one next-token distribution over the slots that their vocabularies share."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from tokenkit.config import UserError
from tokenkit.eval.bits_per_byte import BitsPerByte, EvalConfig, scored_batches
from tokenkit.eval.combine import Combination
from tokenkit.eval.ends import end_ids
from tokenkit.eval.pairs import tokens_before
from tokenkit.eval.vocabulary_union import Slots
from tokenkit.models.reader import Reader
from tokenkit.models.sample import Drawing, check_positions, draw, padded, sequence_key
from tokenkit.models.stopping import TextSoFar
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.base import Tokenizer

PROMPTS = 16  # that are continued together

Batch = tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]


@dataclass(frozen=True)
class Member:
    """A model and its tokenizer."""

    view: ModelView
    tokenizer: Tokenizer

    @property
    def ends(self) -> list[int]:
        """Ids that end what it writes."""
        return end_ids(self.view.model, self.tokenizer)


class Ensemble:
    """Members that read ids of their own and choose among the same slots."""

    def __init__(self, members: Sequence[Member], slots: Slots, combine: Combination, *, mapped: bool = False) -> None:
        """`mapped`: what is scored is cut as the first model cuts it, and the others read their ids of its slots."""
        self.members, self.slots, self.combine, self.mapped = members, slots, combine, mapped

    @torch.no_grad()
    def bits_per_byte(self, documents: Sequence[str], config: EvalConfig) -> BitsPerByte:
        """Of the ensemble, over the tokens of the first model; its members' figures are `bits_per_byte` of each."""
        if not self.mapped:
            self._check_alike(documents)
        nats, count = 0.0, 0
        for batches in self._batches(documents, config):
            for logp, wanted in self._distributions(batches):
                nats -= self._said(logp, wanted).sum().item()
                count += len(wanted)
        num_bytes = sum(len(document.encode()) for document in documents)
        return BitsPerByte(nats / (math.log(2) * num_bytes), nats, num_bytes, count)

    @torch.no_grad()
    def scores(self, pairs: Sequence[tuple[str, str]], *, positions: int = 512) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the continuation's log-probability in nats, and whether every token of it is
        the likeliest slot.

        Both are encoded together; the border is where the context without its trailing spaces ends. Where both are
        longer than `positions`, the beginning of the context is left out, for every member the same tokens.
        """
        if not self.mapped:
            self._check_alike([context + continuation for context, continuation in pairs])
        found = []
        for context, continuation in pairs:  # one row at a time: members' rows have one length
            logp, best = 0.0, True
            for some, wanted in self._distributions(self._pair(context, continuation, positions)):
                logp += self._said(some, wanted).sum().item()
                best &= bool((some.argmax(1) == wanted).all())
            found.append((logp, best))
        return found

    def _pair(self, context: str, continuation: str, positions: int) -> tuple[Batch, ...]:
        batches: list[Batch] = []
        for number, member in enumerate(self.members[:1] if self.mapped else self.members):
            encoding = member.tokenizer.encode(context + continuation)
            ids, first = encoding.ids.tolist(), tokens_before(encoding, len(context.rstrip().encode()))
            if len(ids) - first > positions:
                raise UserError(f"a continuation of {len(ids) - first} tokens, but models read {positions}; shorten it")
            cut = max(0, len(ids) - positions)  # the start token and all but the last id are read
            inputs = torch.tensor([[member.tokenizer.start_id(), *ids[cut:]]], device=self._device(number))
            labels = torch.full_like(inputs, -1)
            labels[0, first - cut : -1] = inputs[0, 1 + first - cut :]
            batches.append((inputs, labels))
        return self._with_mapped(batches)

    def _distributions(self, batches: Sequence[Batch]) -> Iterator[tuple[Float[Tensor, "N S"], Int64[Tensor, "N"]]]:
        """The ensemble's log-probabilities at scored places, some places at a time, and the slots that stand there."""
        labels = batches[0][1]
        wanted = self._slots_of(labels[labels >= 0])
        pieces = (
            member.view.log_probabilities(inputs, own >= 0)
            for member, (inputs, own) in zip(self.members, batches, strict=True)
        )
        for logits in zip(*pieces, strict=True):
            logp = self.combine([self.slots.logp(n, one).double().cpu() for n, one in enumerate(logits)])
            here, wanted = wanted[: len(logp)], wanted[len(logp) :]
            yield logp, here

    def _said(self, logp: Float[Tensor, "N S"], slots: Int64[Tensor, "N"]) -> Float[Tensor, "N"]:
        """Their log-probabilities; UserError where one is impossible: a member ends its texts with that token."""
        found = logp.gather(1, slots[:, None]).squeeze(1)
        if bool((found == -torch.inf).any()):
            token = self.slots.spelled[int(slots[found == -torch.inf][0])]
            raise UserError(f"models: {token!r} of the text is impossible for one of them; write combine=mean_prob")
        return found

    def _batches(self, documents: Sequence[str], config: EvalConfig) -> Iterator[tuple[Batch, ...]]:
        sides = self.members[:1] if self.mapped else self.members
        for batches in zip(*(scored_batches(m.view, m.tokenizer, documents, config) for m in sides), strict=True):
            yield self._with_mapped(batches)

    def _with_mapped(self, batches: Sequence[Batch]) -> tuple[Batch, ...]:
        """With what mapped members read, where there are some."""
        if not self.mapped:
            return (*batches,)
        (inputs, labels), others = batches[0], range(1, len(self.members))
        return (batches[0], *((self._mapped(n, inputs, labels), labels.to(self._device(n))) for n in others))

    def _mapped(self, model: int, inputs: Int[Tensor, "B T"], labels: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """What another model reads: its start token, then its ids of the first one's slots; any id at padding."""
        slots = self.slots.slot_of.to(inputs.device)[inputs].clamp_min(0)
        ids = self.slots.ids[model].to(inputs.device)[slots]
        ids[:, 0] = self.members[model].tokenizer.start_id()
        read = (labels >= 0).flip(1).cumsum(1).flip(1) > 0
        if bool((read & (ids < 0)).any()):
            token = self.slots.spelled[int(slots[read & (ids < 0)][0])]
            raise UserError(f"mappings: model {model} has no token for {token!r} of the text; write mode=byte")
        return ids.clamp_min(0).to(self._device(model))

    def _device(self, model: int) -> torch.device:
        return self.members[model].view.model.device

    def _slots_of(self, ids: Int[Tensor, "N"]) -> Int64[Tensor, "N"]:
        slots = self.slots.slot_of[ids.cpu()]
        if bool((slots < 0).any()):
            missing = self.members[0].tokenizer.token_bytes[int(ids.cpu()[slots < 0][0])]
            raise UserError(f"models: {missing!r} of the text is not a token of all of them; write mode=byte")
        return slots

    def _check_alike(self, documents: Sequence[str]) -> None:
        """UserError where members cut a text differently: there is no one sequence of tokens to be scored."""
        first = self.members[0].tokenizer
        ours = first.encode_batch([*documents])
        for member in self.members[1:]:
            for one, other in zip(ours, member.tokenizer.encode_batch([*documents])):
                if one.ends.tolist() != other.ends.tolist():
                    raise UserError(
                        f"models: {first.name} and {member.tokenizer.name} cut the text differently, so no sequence of "
                        "tokens is both's; write mode=byte"
                    )

    @torch.no_grad()
    def continued(
        self,
        prompts: "Sequence[str | Sequence[list[int]]]",
        drawing: Drawing,
        *,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """One continuation per prompt, without it, up to any member's end or a stop string.

        A prompt is text, which each model reads after its own start token as its own tokenizer cuts it; or ids of each
        model, taken as they are.
        """
        rows = [self._ids(prompt) for prompt in prompts]
        readers = [Reader(member.view.model) for member in self.members]
        size = PROMPTS if all(reader.pads for reader in readers) else 1
        found: list[str] = []
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            keys = torch.tensor([sequence_key(seed, number) for number in range(start, start + len(some))])
            found += self._together(some, keys, drawing, stop)
        return found

    def _ids(self, prompt: "str | Sequence[list[int]]") -> list[list[int]]:
        if not isinstance(prompt, str):
            return list(prompt)
        sides = [member.tokenizer for member in self.members]
        return [[side.start_id(), *side.encode_batch([prompt])[0].ids.tolist()] for side in sides]

    def _together(
        self, rows: Sequence[list[list[int]]], keys: Int64[Tensor, "B"], drawing: Drawing, stop: Sequence[str]
    ) -> list[str]:
        readers = [Reader(member.view.model) for member in self.members]
        logits = []
        for number, reader in enumerate(readers):
            own = [row[number] for row in rows]
            check_positions(self.members[number].view.model, max(map(len, own)) + drawing.max_new_tokens)
            logits.append(reader(*padded(own, self._device(number))))
        texts, active = [TextSoFar(stop) for _ in rows], set(range(len(rows)))
        for n in range(drawing.max_new_tokens):
            logp = self.combine([self.slots.logp(number, one).double().cpu() for number, one in enumerate(logits)])
            chosen = draw(logp, keys, n, drawing)
            for row, slot in enumerate(chosen.tolist()):
                if row in active and slot != self.slots.end:
                    texts[row].add(self.slots.spelled[slot])
                if slot == self.slots.end or texts[row].stopped:
                    active.discard(row)
            if not active or n + 1 == drawing.max_new_tokens:
                break
            read = self.slots.ids[:, chosen.clamp_max(self.slots.end - 1)].clamp_min(0)  # rows that are over read on
            logits = [reader(read[k][:, None].to(self._device(k))) for k, reader in enumerate(readers)]
        for text in texts:
            text.finish()
        return [text.text for text in texts]
