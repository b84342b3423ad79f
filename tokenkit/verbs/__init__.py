"""One file per verb of the command line: the schema of its run file, and the function that does it."""

import difflib
import importlib

from tokenkit.config import Config, UserError

RUNS = {
    "demo": "demo.DemoRun",
    "pretrain": "pretrain.PretrainRun",
    "transfer": "transfer.TransferRun",
    "train-hypernet": "train_hypernet.TrainHypernetRun",
    "distill": "distill_run.DistillRun",
    "record": "record.RecordRun",
    "synthesize": "synthesize.SynthesizeRun",
    "filter": "filter.FilterRun",
    "eval": "evaluate.EvalRun",
    "eval-lockstep": "eval_lockstep.EvalLockstepRun",
    "align": "align.AlignRun",
    "doctor": "doctor.DoctorRun",
    "audit": "audit.AuditRun",
    "inspect": "inspect.InspectRun",
    "mined-mapping": "mined_mapping.MinedMappingRun",
    "generate": "generate.GenerateRun",
    "export": "export.ExportRun",
    "merge-lora": "merge_lora.MergeLoraRun",
    "report": "report.ReportRun",
    "bench": "bench.BenchRun",
    "card": "card.CardRun",
    "sweep": "sweep.SweepRun",
    "study": "study.StudyRun",
    "search": "search.SearchRun",
    "architectures": "architectures.ArchitecturesRun",
    "tokenizer-info": "tokenizer_info.TokenizerInfoRun",
    "vocabulary extend": "vocabulary.extend.VocabularyExtendRun",
    "vocabulary prune": "vocabulary.prune.VocabularyPruneRun",
    "vocabulary check": "vocabulary.check.VocabularyCheckRun",
    "tokenizer prepare": "tokenizer.prepare.TokenizerPrepareRun",
    "tokenizer pretrain": "tokenizer.pretrain.TokenizerPretrainRun",
    "tokenizer test": "tokenizer.test.TokenizerTestRun",
    "tokenizer gates": "tokenizer.gates.TokenizerGatesRun",
    "tokenizer compare": "tokenizer.compare.TokenizerCompareRun",
    "tokenizer analyze": "tokenizer.analyze.TokenizerAnalyzeRun",
    "tokenizer prune": "tokenizer.prune.TokenizerPruneRun",
    "tokenizer manage-checkpoints": "tokenizer.manage_checkpoints.TokenizerCheckpointsRun",
    "tokenizer export": "tokenizer.export.TokenizerExportRun",
    "tokenizer benchmark": "tokenizer.benchmark.TokenizerBenchmarkRun",
    "tokenizer migrate": "tokenizer.migrate.TokenizerMigrateRun",
}


def run_schema(verb: str) -> type[Config]:
    """The schema of a verb's run file."""
    if verb not in RUNS:
        close = difflib.get_close_matches(verb, RUNS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"write one of {', '.join(RUNS)}"
        raise UserError(f"schema: {verb!r} is no verb with a run file; {hint}")
    module, _, name = RUNS[verb].rpartition(".")
    return importlib.import_module(f"tokenkit.verbs.{module}").__dict__[name]
