"""Any Hugging Face fast tokenizer: a tokenizer.json with its role tokens and its chat template."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Encoding, framed
from tokenkit.tokenizers.byteview import ByteView
from tokenkit.tokenizers.pieces import Definition, model_type, model_vocabulary

ROLES = ("bos", "eos", "pad")
AS_BERT = {
    "bos": "cls",
    "eos": "sep",
    "pad": "pad",
}  # what begins and ends a text where the family says so in other words
# Keys of a found tokenizer_config.json that name classes or repeat tokenizer.json; a saved config must not carry them.
CLASS_KEYS = ("tokenizer_class", "auto_map", "processor_class", "added_tokens_decoder", "backend", "is_local")


class TokenizerFiles:
    """A tokenizer.json and what stands beside it: roles, special tokens, chat template. Nothing is encoded."""

    def __init__(self, definition: Definition, config: dict[str, Any] | None = None, name: str = "tokenizer") -> None:
        """`config` is a parsed tokenizer_config.json: role tokens, chat template. `name` is for messages."""
        self.name = name
        self._json = json.dumps(definition, ensure_ascii=False)  # parsed, a large vocabulary takes ten times the memory
        self.config = dict(config or {})
        try:
            model_type(definition)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        self.added_tokens: list[dict[str, Any]] = definition.get("added_tokens") or []
        added = self.added_tokens
        ids = model_vocabulary(definition) | {token["content"]: token["id"] for token in added}
        self.bos_id, self.eos_id, self.pad_id = (self._role_id(role, ids) for role in ROLES)
        if config is None and len(added) == 1 and added[0]["special"]:  # a bare tokenizer.json with one special token
            self.eos_id = added[0]["id"]
        roles = {index for index in (self.bos_id, self.eos_id, self.pad_id) if index is not None}
        self.special_ids: frozenset[int] = frozenset({token["id"] for token in added if token["special"]} | roles)
        self.special_tokens = {content: index for content, index in ids.items() if index in self.special_ids}
        self.num_ids = 1 + max(ids.values(), default=-1)

    @property
    def definition(self) -> Definition:
        """The parsed tokenizer.json, as it was found."""
        return json.loads(self._json)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template found with the tokenizer."""
        return self.config.get("chat_template")

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over the canonical tokenizer.json and the role tokens."""
        content = {"tokenizer": self.definition, "roles": [self.bos_id, self.eos_id, self.pad_id]}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def start_id(self) -> int:
        """The id that begins every document: bos, else eos."""
        for index in (self.bos_id, self.eos_id):
            if index is not None:
                return index
        raise UserError(f"{self.name}: has neither bos nor eos; {self._how_to_name_one()}")

    def _how_to_name_one(self) -> str:
        found = [token["content"] for token in self.added_tokens if token["special"]]
        if not found:
            return f"it has no special token: {self.name}:target=Llama3 adds those of a family"
        unknown = self.definition["model"].get("unk_token")
        found = [token for token in found if token != unknown] or found
        example = json.dumps({"bos_token": found[0], "eos_token": found[min(1, len(found) - 1)]}, ensure_ascii=False)
        other_name = self.name.endswith(".json") and Path(self.name).name != "tokenizer.json"
        example += "; for that this file has to be called tokenizer.json" if other_name else ""
        return f"of its special tokens, name them in tokenizer_config.json beside tokenizer.json, such as {example}"

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained(folder)` loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._json, encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {key: value for key, value in self.config.items() if key not in CLASS_KEYS and key != "chat_template"}
        names = {index: content for content, index in self.special_tokens.items()}
        for role, index in zip(ROLES, (self.bos_id, self.eos_id, self.pad_id)):
            if index is not None:
                config[f"{role}_token"] = names[index]
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", "utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    def _role_id(self, role: str, ids: dict[str, int]) -> int | None:
        token = self.config.get(f"{role}_token", self.config.get(f"{AS_BERT[role]}_token"))
        content = token["content"] if isinstance(token, dict) else token
        if content is not None and content not in ids:
            raise UserError(
                f"{self.name}: {role}_token is {content!r}, which tokenizer.json does not hold; name another"
            )
        return None if content is None else ids[content]


class HFTokenizer(TokenizerFiles):
    """Any tokenizer.json, with its roles and its files. Special-token literals inside a text are text."""

    def __init__(self, definition: Definition, config: dict[str, Any] | None = None, name: str = "tokenizer") -> None:
        """`config` is a parsed tokenizer_config.json: role tokens, chat template. `name` is for messages."""
        super().__init__(definition, config, name)
        self._view = ByteView(definition, self.special_ids, name)
        self.token_bytes = self._view.token_bytes
        self.vocab_size = len(self.token_bytes)
        self.changes = self._view.changes

    @property
    def lossless(self) -> bool:
        """Whether the tokens spell ordinary text as it was written, up to Unicode normalisation."""
        return self._view.lossless

    def encode(self, text: str, *, special: bool = False) -> Encoding:
        """Ids and byte spans; with `special`, begun by bos where the tokenizer has one."""
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: list[str], *, special: bool = False, continued: bool = False) -> list[Encoding]:
        """One encoding per text; `continued` texts get a dummy space only where one follows special tokens."""
        encodings = self._view.encode_batch(texts, continued)
        return [framed(encoding, self.bos_id) for encoding in encodings] if special else encodings

    def decode(self, ids: list[int]) -> str:
        """The text of the ids without specials and leading dummy space; incomplete characters become U+FFFD."""
        if not self.lossless:
            return self._view.decode_by_library(ids)
        spelled = b"".join([self.token_bytes[index] for index in ids])
        return (spelled[1:] if self._view.adds_space and spelled[:1] == b" " else spelled).decode(
            "utf-8", errors="replace"
        )
