"""Score samples: python tools/evaluate.py run=runs/demo n=1000 kid_subset_size=100 out=evaluation.json"""

from __future__ import annotations

from pathlib import Path

from dvae.errors import run_command

USAGE = """usage: python tools/evaluate.py run=FOLDER [metrics=[fid,kid,isc,prc]] [n=1000] [seeds=[0]] [inception=FILE]
       [out=evaluation.json] [reference=SHARDS|FOLDER] [split=train] [n_reference=0] [vae=BOOL] [guidance=1]
       [label_guidance=1] [pca_guidance=1] [sampler=NAME] [sampler.FIELD=VALUE] [batch=64] [processes=1]
       [memorization=N]
       [kid_subset_size=1000] [kid_subsets=100] [prc_neighborhood=3] [isc_splits=10] [cache=FOLDER]
       python tools/evaluate.py images=FOLDER reference=FOLDER [...]
       python tools/evaluate.py run=FOLDER sweep=nfe [samplers=[ddim,dpmpp_2m]] [steps=[5,10,25,50]] [...]
       python tools/evaluate.py run=FOLDER noise=[0,0.1,0.2] [...]
       python tools/evaluate.py compare=[A.json,B.json,...]

Draws n samples per seed, as tools/sample.py does, and scores them against the run's training images, or `reference`;
images= scores a folder of PNG or JPEG files, a .zip, .tar or .npy file. inception= is the file of the standard
Inception's weights (torch-fidelity's weights-inception-2015-12-05-6726825d.pth): figures are then those of
torch-fidelity's own command line, to the last bit. Without it they are taken on EfficientNet-Lite0 and named FID-lite0
and so on.
Every result holds its protocol; compare= prints a table of results, and refuses those of unlike protocols.
sweep=nfe draws quality against network evaluations, noise= against Gaussian noise on x_hat; memorization= looks for the
training images nearest to samples. The same command again goes on where it was ended."""


def command(argv: list[str]) -> None:
    """Compose the words, score, and print the figures."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
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
