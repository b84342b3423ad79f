"""An ensemble as lm-evaluation-harness sees a model. Imports that package, so it is imported only where it is used."""

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs

from tokenkit.config import UserError
from tokenkit.eval.harness import Subject
from tokenkit.eval.lm_eval_backends import LmEvalBackend
from tokenkit.eval.lockstep import Lockstep, drawn_at

NEW_TOKENS = 256  # that are generated at most where a task names no number
BYTES_PER_TOKEN = 4  # how many bytes stand for a token of a task's limit
KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")


class LockstepLM(LM):
    """Answers the harness's three questions with an ensemble. Contexts are text; chat templates are not applied."""

    def __init__(self, lockstep: Lockstep, *, seed: int = 0) -> None:
        super().__init__()
        self.lockstep, self.seed = lockstep, seed

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """In nats, and whether greedy generation would write the continuation. Equal questions are asked once."""
        pairs = [_two(request) for request in requests]
        asked = list(dict.fromkeys(pairs))
        found = dict(zip(asked, self.lockstep.scores(asked), strict=True))
        return [found[pair] for pair in pairs]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of whole texts, in nats."""
        return [self.lockstep.logp(request.args[0]) for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continuations up to the first stop string, which is left out; over bytes a token's limit is four bytes."""
        found = []
        for request in requests:
            prompt, given = request.args
            asked: dict[str, Any] = dict(normalize_gen_kwargs(given, NEW_TOKENS))
            unknown = [key for key in asked if key not in KNOWN]
            if unknown:
                raise UserError(
                    f"task {request.task_name}: generation option {unknown[0]}; there are {', '.join(KNOWN)}"
                )
            warmth = asked.get("temperature")
            temperature = (1.0 if warmth is None else float(warmth)) if asked.get("do_sample") else 0.0
            count = int(asked["max_gen_toks"]) * (BYTES_PER_TOKEN if self.lockstep.unit == "byte" else 1)
            draw = drawn_at(temperature, float(asked.get("top_p") or 1.0))
            stop = [one for one in asked["until"] if one]
            found += self.lockstep.write([prompt], draw, count=count, seed=self.seed, stop=stop)
        return found


def _two(request: Instance) -> tuple[str, str]:
    context, continuation = request.args
    return context, continuation


class LockstepBackend(LmEvalBackend):
    """Tasks of lm-evaluation-harness, asked of one ensemble whatever the subject is called."""

    def __init__(self, lockstep: Lockstep, asked: Any, *, device: str, seed: int = 0) -> None:
        super().__init__("tokenkit", asked, device=device)
        self.lm = LockstepLM(lockstep, seed=seed)

    def _model(self, subject: Subject) -> LockstepLM:
        return self.lm
