"""The `detserve` command: the table of commands, and the one place where errors become messages and exit codes.

0 success · 1 a check failed · 2 usage or input error · 130 interrupted
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from dethandlers import __version__
from dethandlers.errors import DetectorError
from detserve.errors import DetserveError

COMMANDS: dict[str, str] = {
    "archive": "dettools.commands.archive",
    "export": "dettools.commands.export",
    "inspect": "dettools.commands.inspect",
    "verify": "dettools.commands.verify",
    "publish": "dettools.commands.publish",
    "serve": "dettools.commands.serve",
    "edge": "dettools.commands.edge",
    "models": "dettools.commands.models",
    "keys": "dettools.commands.keys",
    "predict": "dettools.commands.predict",
    "compare": "dettools.commands.compare",
    "evaluate": "dettools.commands.evaluate",
    "eval-metric": "dettools.commands.eval_metric",
    "benchmark": "dettools.commands.benchmark",
    "occluded-recall": "dettools.commands.occluded_recall",
    "optimize-anchors": "dettools.commands.optimize_anchors",
    "robustness": "dettools.commands.robustness",
    "robustness-eval": "dettools.commands.robustness_eval",
    "coco-error-analysis": "dettools.commands.coco_error_analysis",
    "confusion-matrix": "dettools.commands.confusion_matrix",
    "analyze-results": "dettools.commands.analyze_results",
    "analyze-logs": "dettools.commands.analyze_logs",
    "report": "dettools.commands.report",
    "view": "dettools.commands.view",
    "browse-dataset": "dettools.commands.browse_dataset",
    "download-dataset": "dettools.commands.download_dataset",
    "convert-dataset": "dettools.commands.convert_dataset",
    "upgrade-checkpoint": "dettools.commands.upgrade_checkpoint",
    "regnet2mmdet": "dettools.commands.regnet2mmdet",
    "detectron2pytorch": "dettools.commands.detectron2pytorch",
    "print-config": "dettools.commands.print_config",
    "flops": "dettools.commands.flops",
    "graph": "dettools.commands.graph",
    "doctor": "dettools.commands.doctor",
    "scenes": "dettools.commands.scenes",
    "mmdet2torchserve": "dettools.commands.mmdet2torchserve",
    "test-torchserver": "dettools.commands.test_torchserver",
}

_EPILOG = """\
from a checkpoint to a service that is proven to equal it:
  detserve archive model_store/shapes/shapes.yaml     pack
  detserve verify model_store/shapes.mar              check what was packed
  detserve serve start --models shapes                serve
  detserve predict shapes scene.jpg --save-dir out    call
  detserve compare shapes scene.jpg --work-dir out    prove: served equals eager
  detserve evaluate shapes --images val/ --annotations val.json --against eager
                                                      how accurate is the endpoint, and as accurate as eager?
  detserve benchmark served shapes --images val/ --rate 5:40:5 --slo-p99 250ms
                                                      how fast, under an honest load?
  detserve serve stop

exit codes: 0 success, 1 a check failed, 2 usage or input error
"""


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of all commands, or of one: what is run need not wait for the others' modules."""
    parser = argparse.ArgumentParser(
        prog="detserve",
        description="Packs an object detector, serves it with TorchServe, and proves that what is served is what was "
        "trained.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"detserve {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for module in COMMANDS.values() if only is None else [COMMANDS[only]]:
        importlib.import_module(module).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = build_parser(words[0] if words and words[0] in COMMANDS else None).parse_args(words)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except (DetserveError, DetectorError) as error:
        print(f"detserve {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"detserve {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`); nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


if __name__ == "__main__":
    sys.exit(main())
