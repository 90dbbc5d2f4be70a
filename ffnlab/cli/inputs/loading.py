"""What a training run reads, by the kind of its data."""

import functools

import jax

from ffnlab.cli.inputs.captioned import CaptionedData, load_captioned
from ffnlab.cli.inputs.channel_kinds import CellFreeConfig, CellularConfig
from ffnlab.cli.inputs.channels import ChannelData, load_channels
from ffnlab.cli.inputs.corpus import Corpus, HiddenText, load_corpus, load_hidden
from ffnlab.cli.inputs.data_kinds import (
    BlockModelConfig,
    CaptionedConfig,
    DataConfig,
    DomainsConfig,
    GraphConfig,
    HeteroConfig,
    NetworksConfig,
    PermutationConfig,
    QuestionsConfig,
    SequencesConfig,
    SeriesConfig,
    SpeechConfig,
    TextsConfig,
    WeatherConfig,
)
from ffnlab.cli.inputs.domains import DomainsData, load_domains
from ffnlab.cli.inputs.forward import forward_data
from ffnlab.cli.inputs.hetero import HeteroData, load_hetero
from ffnlab.cli.inputs.labelled import LabelledData, load_labelled
from ffnlab.cli.inputs.networks import NetworksData, load_networks
from ffnlab.cli.inputs.nodes import NodeData, node_data
from ffnlab.cli.inputs.permutation import PermutationData, load_permutation
from ffnlab.cli.inputs.questions import QuestionsData, load_questions
from ffnlab.cli.inputs.sequences import SequencesData, load_sequences
from ffnlab.cli.inputs.series import SeriesData, load_series
from ffnlab.cli.inputs.speech import SpeechData, load_speech
from ffnlab.cli.inputs.texts import TextsData, load_texts
from ffnlab.cli.inputs.weather import WeatherData, load_weather
from ffnlab.cli.training import (
    TrainConfig,
    fresh,
)
from ffnlab.models import EncoderConfig

__all__ = ["RunData", "load_data"]

RunData = (
    Corpus
    | HiddenText
    | LabelledData
    | TextsData
    | QuestionsData
    | NodeData
    | HeteroData
    | SpeechData
    | CaptionedData
    | DomainsData
    | PermutationData
    | SequencesData
    | WeatherData
    | SeriesData
    | NetworksData
    | ChannelData
)


def load_data(settings: TrainConfig) -> RunData:
    """What a run reads, by the kind of its data."""
    data, model = settings.data, settings.model
    if isinstance(data, SpeechConfig):
        return load_speech(data, model)  # type: ignore[arg-type]
    if isinstance(data, CaptionedConfig):
        return load_captioned(data)
    if isinstance(data, GraphConfig | BlockModelConfig):
        return forward_data(settings) if settings.rule == "forward_gnn" else node_data(data, model)
    if isinstance(data, HeteroConfig):
        return load_hetero(data, model)
    if isinstance(data, DomainsConfig):
        return load_domains(data, model)
    if isinstance(data, PermutationConfig):
        return load_permutation(data)
    if isinstance(data, SequencesConfig):
        return load_sequences(data, model)
    if isinstance(data, WeatherConfig):
        return load_weather(data, model)
    if isinstance(data, SeriesConfig):
        return load_series(data, model, settings.run.seed)
    if isinstance(data, NetworksConfig):
        return load_networks(data, model)
    if isinstance(data, CellularConfig | CellFreeConfig):
        return load_channels(data)
    if isinstance(model, EncoderConfig):
        whole = jax.eval_shape(functools.partial(fresh, settings), jax.random.key(0)).config
        if isinstance(data, TextsConfig):
            return load_texts(data, whole)
        if isinstance(data, QuestionsConfig):
            return load_questions(data, whole)
        return load_hidden(settings.text, model)
    if isinstance(data, DataConfig):
        return load_corpus(data, model.vocab)  # type: ignore[attr-defined]
    return load_labelled(settings)
