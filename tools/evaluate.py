"""Score samples: python tools/evaluate.py run=runs/demo n=1000 kid_subset_size=100"""

from __future__ import annotations

from pathlib import Path

from dvae.config.command_line import Command
from dvae.errors import run_command

ABOUT = Command(
    name="evaluate",
    text="""Score samples of a run, or images in files, by FID, KID, IS, precision and recall.

  python tools/evaluate.py run=runs/demo n=1000 kid_subset_size=100       # against the run's training images
  python tools/evaluate.py images=samples/ reference=faces/               # two folders of images
  python tools/evaluate.py run=runs/demo sweep=nfe samplers=[ddim,dpmpp_2m] steps=[5,10,25]    # quality against NFE
  python tools/evaluate.py run=runs/demo noise=[0,0.1,0.2]                # quality against noise on x_hat
  python tools/evaluate.py run=runs/demo memorization=16                  # training images nearest to samples
  python tools/evaluate.py compare=[a.json,b.json]                        # a table of earlier results

- inception= takes the file of the standard Inception weights (weights-inception-2015-12-05-6726825d.pth of
  torch-fidelity). The figures are then equal to those of torch-fidelity's command line, bit for bit.
- Without inception= the features are those of EfficientNet-Lite0. These figures are named FID-lite0, KID-lite0 and so
  on, and are not comparable with figures on Inception features.
- Every result holds its protocol. compare= refuses results with different protocols.
- Samples are drawn as tools/sample.py does; sampler=NAME and sampler.FIELD=VALUE work in the same way.
- The same command resumes after an interruption.""",
    settings=("dvae.evaluation.evaluation_settings:EvaluateToolConfig",),
    bare="run",
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Compose the words, score, and print the figures."""
    argv = ABOUT.arguments(argv)
    from dvae.config import compose
    from dvae.evaluation import tables
    from dvae.evaluation.evaluation_settings import EvaluateToolConfig

    settings: EvaluateToolConfig = compose.tool_settings(compose.compose("evaluate", words_of(argv)))
    if settings.compare:
        print(tables.comparison(settings.compare))
        return
    from dvae.evaluation import evaluation_studies

    if settings.over or settings.noise:
        points = (evaluation_studies.sweep_nfe if settings.over else evaluation_studies.sweep_noise)(settings)
        print(tables.of_study(points, "nfe" if settings.over else "noise"))
        print(f"{settings.out}: {len(points)} points; picture and table beside it")
        return
    result = evaluation_studies.score_once(settings)
    print(tables.of_result(result))
    if "memorization" in result:
        for space in ("pixels", "features"):
            found = result["memorization"][space]
            print(f"nearer to a training image, in {space}, than all but 1% of held-out images: "
                  f"{100 * found['share_of_samples_near']:.1f}% of samples")  # fmt: skip
        print(Path(settings.out).with_suffix(".memorization.png"))
    print(settings.out)


def words_of(argv: list[str]) -> list[str]:
    """The words as Hydra wants them: sweep=nfe is `over`, since recipes/sweep is a group where it would look."""
    from dvae.tools.sample import own_sampler

    return own_sampler([f"over={word[6:]}" if word.startswith("sweep=") else word for word in argv])


if __name__ == "__main__":
    run_command(command)
