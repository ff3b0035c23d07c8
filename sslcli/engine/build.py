"""From words to things: the method and its backbone that a preset describes."""

from sslcli import dist
from sslcli.config import choice
from sslcli.config.presets import PretrainPreset
from sslcli.contracts import Backbone, Method, RunFacts
from sslcli.seeds import seed_here


def facts_of(preset: PretrainPreset, *, images: int, steps_per_epoch: int) -> RunFacts:
    """The sizes of a run over so many images."""
    run, batch = preset.run, preset.data.batch_size
    steps = run.steps if run.steps is not None else round((run.epochs or 0) * steps_per_epoch)
    return RunFacts(
        images=images,
        batch_size=batch,
        part_size=batch // run.accumulate,
        steps_per_epoch=steps_per_epoch,
        total_steps=max(1, steps),
    )


def method_of(preset: PretrainPreset, facts: RunFacts) -> Method:
    """The method with freshly initialised weights: equal on all ranks, a function of the preset's seed alone."""
    seed_here(preset.seed, "init")
    backbone: Backbone = choice.build("sslcli.backbones", preset.backbone)(preset.backbone)
    method: Method = choice.build("sslcli.methods", preset.method)(preset.method, backbone, facts)
    method.copy_student()
    return method


def images_per_rank(preset: PretrainPreset) -> int:
    """Images in one forward pass of one rank."""
    return preset.data.batch_size // (dist.world() * preset.run.accumulate)
