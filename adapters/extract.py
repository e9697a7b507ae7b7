"""The command that extracts a LoRA from a tuned model: ``python -m adapters.extract TUNED``."""

import argparse
from collections.abc import Sequence

from adapters.command import command_parser, run_command
from adapters.weights.kinds import PRESETS


def main(arguments: Sequence[str] | None = None) -> None:
    """Extract a LoRA and print its error."""
    parser = command_parser(
        "extract",
        "Write the difference between a fine-tuned model and its base as a LoRA; print its error.",
        "my-tuned-stage-1 --base models/if-tiny/stage_1 --rank 16 --out extracted",
        *("--rank", "--error", "--out", "--device", "--revision", "--variant"),
    )
    add = parser.add_argument
    add("tuned", help="the fine-tuned model, folder or hub name, or the folder of its UNet")
    help_ = "the model that it was tuned from, a folder or owner/name[@revision]"
    add("--base", required=True, metavar="MODEL", help=help_)
    help_ = f"modules to adapt: {', '.join(PRESETS)}, or patterns (default: all)"
    add("--targets", nargs="+", default=["all"], help=help_)
    help_ = "an example that shows the LoRA's effect, for its card; may be repeated"
    add("--prompt", action="append", default=[], help=help_)
    add("--tuned-revision", help="the tuned model's hub revision")
    add("--tuned-variant", help="the variant of the tuned model's weights")
    run_command(parser, arguments, _extract)


def _extract(options: argparse.Namespace) -> str:
    from adapters.arguments import find_device
    from adapters.base.source import source_of
    from adapters.base.stored_unet import StoredUNet
    from adapters.merging.low_rank import extract
    from adapters.weights.approximation import Approximation

    targets = options.targets
    source = source_of(options.base, options.revision, options.variant)
    return extract(
        StoredUNet.find(options.tuned, options.tuned_revision, options.tuned_variant),
        source,
        options.out,
        Approximation.limited(options.rank, options.error),
        targets=targets[0] if len(targets) == 1 else tuple(targets),
        prompts=options.prompt,
        device=find_device(options.device),
    )


if __name__ == "__main__":
    main()
