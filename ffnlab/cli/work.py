"""What a step of a training run does, in items and operations."""

from collections.abc import Mapping

from flax import nnx

from ffnlab.cli.inputs.batch_shapes import speech
from ffnlab.cli.inputs.data_kinds import (
    DataConfig,
    NetworksConfig,
    SpeechConfig,
    WeatherConfig,
)
from ffnlab.cli.inputs.reading import inputs_of
from ffnlab.cli.pipelining import in_list
from ffnlab.cli.rules import HALVED
from ffnlab.cli.training import TrainConfig
from ffnlab.formats.kinds import KINDS
from ffnlab.graphs import forecasts
from ffnlab.models.account import flops_per_token
from ffnlab.models.calibration import called
from ffnlab.models.cost import multiply_adds
from ffnlab.parallel import Work
from ffnlab.routing import pal

__all__ = ["work_of"]


def work_of(settings: TrainConfig, model: nnx.Module) -> Work:
    """What a step does: tokens predicted, or inputs read, and the operations of both passes.

    The backward pass counts twice the forward one; what is computed again (remat) does not count.
    A decoder's attention counts half of the longest row, which a token attends to on average. Of
    layers that learn one by one a step is that of an average one.
    """
    model = in_list(model)  # a pipeline does the same work, in microbatches
    data, more, steps = settings.data, settings.extension, settings.run.steps
    if isinstance(data, SpeechConfig):
        sounds, (tokens, _) = speech(data, settings.model, 1, 0)
        forward = 2.0 * multiply_adds(pal.answer, model, sounds, tokens)
    elif isinstance(data, NetworksConfig):
        lesson = settings.reading.batch(data, settings.model, 1, 0)
        rows = lesson.rows
        products = multiply_adds(settings.reading.loss(data), model, lesson)
        return Work(lambda position: rows, 6.0 * products / rows, "input")
    elif settings.kind == "icgnn":
        batch = settings.reading.batch(data, settings.model, 1, 0)
        products = multiply_adds(settings.reading.loss(data), model, batch)
        return Work(lambda position: data.batch, 6.0 * products, "input")
    elif isinstance(data, WeatherConfig):
        one = settings.reading.batch(data, settings.model, 1, 0)
        forward = 2.0 * multiply_adds(forecasts, model, one)
    elif settings.kind == "decoder" and isinstance(data, DataConfig):
        forward = flops_per_token(model, -(-settings.text.length // 2))
    elif settings.rule == "forward_gnn":
        from ffnlab.cli.inputs.forward import forward_work

        forward = forward_work(settings, model)
    else:
        length = getattr(data, "length", 0)
        row = inputs_of(settings.reading.batch(data, settings.model, 1, length))
        call = called if isinstance(row, Mapping) else KINDS[settings.kind].call
        forward = 2.0 * multiply_adds(call, model, row)
    times = 2 if settings.rule in HALVED else 1
    if not isinstance(data, DataConfig):
        rows = times * getattr(data, "rows", data.batch)
        return Work(lambda position: rows, 3 * forward, "input")
    per_token = forward if settings.kind == "decoder" else forward / data.length
    short, long = times * data.batch * data.length, times * more.batch * more.length
    return Work(lambda position: short if position < steps else long, 3 * per_token)
