"""Next-token logits for many continuations of one beginning: a tree of tokens that the model reads in one row.

Every node is one position of one key-value cache. It attends to its ancestors alone and stands at its depth, so what it
says is what it would say at the end of its own path, read alone; a path's beginning is read and kept once.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tokenkit.models.expand import BREAK, MAX_BYTES, expansion_of
from tokenkit.models.load import input_matrix, logit_settings, output_head
from tokenkit.models.reader import Reader
from tokenkit.quantities import at_least_float32
from tokenkit.scores import LogitForm

ENDLESS = 1 << 62
ROOT = -1  # the parent of a node that begins a path
logger = logging.getLogger(__name__)


class TreeReader:
    """A causal model and the tree it has read. Nodes are numbered in the order they were read.

    A model that cannot be told who attends to whom (found out once, by comparing) reads whole paths again; so does one
    of sliding windows from the depth on at which a window is full.
    """

    def __init__(self, model: PreTrainedModel, *, shared: bool | None = None) -> None:
        """`shared`: whether one cache serves all paths; None finds out."""
        self.model, self.body, self.head = model, model.base_model, output_head(model)
        self.form = LogitForm(None, **logit_settings(model))
        self.expansion = expansion_of(model)
        self.parents: list[int] = []
        self.ids: list[int] = []
        self.depth: list[int] = []
        self._forget()
        self.window = _window(model)
        self.shared = _can_share(model) if shared is None else shared

    def _forget(self) -> None:
        self.cache = DynamicCache()
        self._slot: dict[int, int] = {}  # of a node that is still in the cache
        self._size = 0  # positions of the cache
        device = input_matrix(self.model).device
        self._attends = torch.zeros(64, 64, dtype=torch.bool, device=device)  # who attends to whom; grows by doubling

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def held(self) -> int:
        """Positions in the cache."""
        return self._size

    def path(self, node: int) -> list[int]:
        """The ids from the beginning to this node."""
        found = []
        while node != ROOT:
            found.append(self.ids[node])
            node = self.parents[node]
        return found[::-1]

    @torch.no_grad()
    def read(self, parents: Sequence[int], ids: Sequence[int]) -> Float[Tensor, "N V"]:
        """Logits, at least float32, that follow each new node; a parent may be an earlier node of the same call."""
        first = len(self)
        self.parents += parents
        self.ids += ids
        for parent in parents:
            self.depth.append(0 if parent == ROOT else self.depth[parent] + 1)
        nodes = range(first, len(self))
        deepest = max(self.depth[first:], default=0)
        hidden = self._in_the_tree(nodes) if self.shared and deepest < self.window else self._alone(nodes)
        return self.form(at_least_float32(self.head(hidden)))

    def read_path(self, ids: Sequence[int]) -> Float[Tensor, "V"]:
        """Reads ids one after the other from the root; the logits after the last, which is the newest node."""
        parents = [ROOT, *range(len(self), len(self) + len(ids) - 1)]
        return self.read(parents, ids)[-1]

    @torch.no_grad()
    def keep(self, nodes: Sequence[int]) -> None:
        """Frees what only other nodes than these and their ancestors need. Only these may get further children."""
        if not self.shared or not self._slot:
            return
        held: set[int] = set()
        for node in nodes:
            while node != ROOT and node not in held:
                held.add(node)
                node = self.parents[node]
        held &= self._slot.keys()
        if not held:
            self._forget()
            return
        places = sorted(self._slot[node] for node in held)
        kept = torch.tensor(places, device=self._attends.device)
        for layer in self.cache.layers:
            assert isinstance(layer, DynamicLayer), "the cache was made of no others"
            assert layer.keys is not None, "something has been read"
            assert layer.values is not None, "something has been read"
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        place = {slot: new for new, slot in enumerate(places)}
        self._slot = {node: place[self._slot[node]] for node in held}
        rows = self._attends[kept][:, kept]
        self._size = len(places)
        self._attends.zero_()[: self._size, : self._size] = rows

    def _in_the_tree(self, nodes: range) -> Float[Tensor, "N D"]:
        before, self._size = self._size, self._size + len(nodes)
        while self._size > len(self._attends):
            self._attends = torch.nn.functional.pad(self._attends, (0, len(self._attends), 0, len(self._attends)))
        for slot, node in enumerate(nodes, before):
            self._slot[node] = slot
            if self.parents[node] != ROOT:
                self._attends[slot] = self._attends[self._slot[self.parents[node]]]
            self._attends[slot, slot] = True
        attends = self._attends[before : self._size, : self._size]
        dtype, device = input_matrix(self.model).dtype, attends.device
        barred = torch.zeros(attends.shape, dtype=dtype, device=device)
        barred.masked_fill_(~attends, torch.finfo(dtype).min)
        output = self.body(
            **self._inputs(nodes),
            attention_mask=barred[None, None],
            position_ids=torch.tensor([[self.depth[node] for node in nodes]], device=device),
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[0]

    def _inputs(self, nodes: range) -> dict[str, Tensor]:
        """The ids in one row; under an input expansion their embeddings, each after its own path."""
        ids = torch.tensor([[self.ids[node] for node in nodes]], device=self._attends.device)
        if self.expansion is None:
            return {"input_ids": ids}
        before = torch.full((len(nodes), MAX_BYTES), BREAK, device=ids.device)
        for row, node in enumerate(nodes):
            at, column = self.parents[node], MAX_BYTES
            while at != ROOT and column:
                column -= 1
                before[row, column] = self.ids[at]
                at = self.parents[at]
        with self.expansion.after(before):
            return {"inputs_embeds": self.model.get_input_embeddings()(ids.T).transpose(0, 1)}

    def _alone(self, nodes: range) -> Float[Tensor, "N D"]:
        """Every path read from its beginning, those of one length together."""
        by_length: dict[int, list[int]] = {}
        for place, node in enumerate(nodes):
            by_length.setdefault(self.depth[node], []).append(place)
        rows: dict[int, Tensor] = {}
        with self.expansion.after(None) if self.expansion is not None else nullcontext():
            for places in by_length.values():
                ids = torch.tensor([self.path(nodes[place]) for place in places], device=self._attends.device)
                states = self.body(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
                rows |= dict(zip(places, states, strict=True))
        return torch.stack([rows[place] for place in range(len(nodes))])


def _window(model: PreTrainedModel) -> int:
    """Positions that every layer looks back on: all, or a sliding window; 0 where some layer does not attend."""
    own = DynamicCache(config=model.config.get_text_config())
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in own.layers):
        return 0
    windows = [layer.sliding_window for layer in own.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return min(windows, default=ENDLESS)


@torch.no_grad()
def _can_share(model: PreTrainedModel) -> bool:
    """Whether branches in one row say what they say alone."""
    if _window(model) < 4:
        return False
    ids = [i % len(input_matrix(model)) for i in range(1, 6)]
    try:
        tree = TreeReader(model, shared=True)
        tree.read([ROOT, 0, 0], ids[:3])
        branched = tree.read([2, 1], ids[3:])
        plain = [Reader(model)(torch.tensor([path], device=model.device))[0] for path in map(tree.path, (3, 4))]
        difference: Any = (branched - torch.stack(plain)).abs().max()
        return bool(difference <= 1e-3 * branched.abs().max())
    except Exception as error:  # whatever a model's own code says of a mask that it does not know
        logger.debug("%s reads no trees: %s", model.config.model_type, error)
        return False
