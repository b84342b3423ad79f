"""Configurations of the old word tokenizer: of the tokenizer itself, and of making its vocabulary from a corpus."""

from typing import Literal

from pydantic import Field, model_validator

from tokenkit.config import Config, UserError


class WordSpecialsSection(Config):
    """Literals of the special tokens, which have the ids 0 to 5 in this order."""

    pad: str = "<pad>"
    unk: str = "<unk>"
    bos: str = "<bos>"
    eos: str = "<eos>"
    user: str = "<|user|>"
    assistant: str = "<|assistant|>"
    system: str = "<|system|>"
    """Accepted and without an id: words begin at 6 in every old vocabulary."""

    @model_validator(mode="after")
    def _differ(self) -> "WordSpecialsSection":
        literals = list(self.model_dump().values())
        repeated = [literal for literal in literals if literals.count(literal) > 1 or not literal]
        if repeated:
            raise UserError(f"special_tokens: {repeated[0]!r} is empty or stands twice; write seven literals")
        return self

    @property
    def literals(self) -> list[str]:
        """Those that have an id, in the order of the ids."""
        return [self.pad, self.unk, self.bos, self.eos, self.user, self.assistant]


class NormalizationSection(Config):
    """What is done to a text before it is split: the reason why this tokenizer cannot give it back."""

    lowercase: bool = True
    remove_accents: bool = False
    handle_punctuation: Literal["separate"] = "separate"
    """Every ASCII punctuation sign is a word of its own."""


class WordConfig(Config):
    """A word tokenizer."""

    tokenizer_type: Literal["word"] = "word"
    version: str = "1.0.0"
    description: str = ""
    vocab_size: int = Field(10_000, ge=7)
    """Most ids that training gives, special tokens included."""
    min_frequency: int = Field(2, ge=1)
    """Times that a word must stand in the corpus."""
    special_tokens: WordSpecialsSection = WordSpecialsSection()
    normalization: NormalizationSection = NormalizationSection()
    vocab_file: str | None = None
    """A vocabulary that exists; without it the tokenizer begins with no words."""


class CorpusSection(Config):
    """Which files are read."""

    source_directory: str = "data/pretraining"
    file_pattern: str = "**/*.txt"
    sample_strategy: Literal["shuffled", "sequential"] = "shuffled"
    sample_size_mb: float = Field(0, ge=0)
    """0 for all."""
    max_training_time_minutes: float = Field(0, ge=0)
    """0 for as long as it takes."""
    validation_split: float = Field(0.1, ge=0, lt=1)
    comment: str = ""


class VocabularySection(Config):
    """The vocabulary that is made."""

    vocab_size: int = Field(50_000, ge=7)
    min_frequency: int = Field(10, ge=1)
    output_path: str = "outputs/tokenizer.vocab"


class ProcessingSection(Config):
    """How files are read."""

    max_files: int = Field(0, ge=0)
    """0 for all."""
    chunk_size_mb: float = Field(10, gt=0)
    parallel_processing: bool = True
    num_threads: int = Field(4, ge=1)
    comment: str = ""


class CorpusPerformanceSection(Config):
    """How counting runs."""

    use_simd: bool = True
    """Accepted and without effect."""
    cache_encodings: bool = False
    memory_limit_mb: int = Field(2048, ge=1)


class CorpusLoggingSection(Config):
    """What is written while counting."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_directory: str = "logs/tokenizer"
    save_stats: bool = True
    stats_file: str = "logs/tokenizer/training_stats.json"


class WordCorpusConfig(Config):
    """Making the vocabulary of a word tokenizer from a folder of texts."""

    tokenizer_type: Literal["word"] = "word"
    version: str = "1.0.0"
    description: str = ""
    data: CorpusSection = CorpusSection()
    tokenizer: VocabularySection = VocabularySection()
    special_tokens: WordSpecialsSection = WordSpecialsSection()
    normalization: NormalizationSection = NormalizationSection()
    processing: ProcessingSection = ProcessingSection()
    performance: CorpusPerformanceSection = CorpusPerformanceSection()
    logging: CorpusLoggingSection = CorpusLoggingSection()

    def word(self) -> WordConfig:
        """The tokenizer whose vocabulary this makes."""
        return WordConfig(
            version=self.version,
            description=self.description,
            vocab_size=self.tokenizer.vocab_size,
            min_frequency=self.tokenizer.min_frequency,
            special_tokens=self.special_tokens,
            normalization=self.normalization,
        )
