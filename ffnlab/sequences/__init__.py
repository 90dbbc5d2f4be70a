"""Systems that read time: losses, baselines and probes; their networks are models."""

from ffnlab.sequences.forecasts import SeriesBatches, forecast_squares, repeated_last

__all__ = ["SeriesBatches", "forecast_squares", "repeated_last"]
