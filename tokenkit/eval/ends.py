"""Which ids end what a model writes."""

from transformers import PreTrainedModel

from tokenkit.models.load import head_matrix
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.chat import end_of_turn_ids


def end_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """End of text, end of turn, and the further ends that the model declares; each once, those the head has."""
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    found = [tokenizer.eos_id, *declared, *end_of_turn_ids(tokenizer)]
    return [i for i in dict.fromkeys(found) if i is not None and i < len(head_matrix(model))]
