"""Which ids end what a model writes."""

from transformers import PreTrainedModel

from tokenkit.models.generate import declared_ends
from tokenkit.models.load import head_matrix
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.chat import end_of_turn_ids


def end_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """End of text, end of turn, and the further ends that the model declares; each once, those the head has."""
    found = dict.fromkeys([*declared_ends(model, tokenizer), *end_of_turn_ids(tokenizer)])
    return [i for i in found if i < len(head_matrix(model))]
