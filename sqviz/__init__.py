"""sqviz: see, touch and run SmoothQuant and StreamingLLM on any causal language model.

    import sqviz
    lm = sqviz.load()                               # or a hub id, a folder, a .gguf file
    m = sqviz.capture(lm, sqviz.text(), samples=16)
    m.outliers()                                    # the channels that break INT8
    sqviz.explore_smoothing(lm, m)                  # slide α, watch the quantisation error

Importing this module does no work: each name is imported on first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "sqviz.models.lm": ["LM"],
    "sqviz.models.load": ["load", "wrap"],
    "sqviz.models.arch": ["ARCHS"],
    "sqviz.corpus.source": ["text"],
    "sqviz.observe.magnitudes": ["Magnitudes"],
    "sqviz.observe.capture": ["capture"],
    "sqviz.observe.attention": ["attention_maps", "AttentionMaps"],
    "sqviz.quant.granularity": ["PerTensor", "PerToken", "PerChannel", "PerGroup"],
    "sqviz.quant.schemes": [
        "Scheme",
        "W8A8",
        "ZEROQUANT",
        "LLM_INT8",
        "OUTLIER_SUPPRESSION",
        "SMOOTHQUANT_O1",
        "SMOOTHQUANT_O2",
        "SMOOTHQUANT_O3",
        "SMOOTHQUANT_LLAMA",
    ],
    "sqviz.quant.clipping": ["ClipTokens", "ClipValues", "LeastError"],
    "sqviz.quant.smooth": ["smooth"],
    "sqviz.quant.alpha": ["search_alpha"],
    "sqviz.quant.found_alpha": ["FoundAlpha"],
    "sqviz.quant.published_alpha": ["alpha_preset", "PUBLISHED_ALPHAS"],
    "sqviz.quant.non_scaling_norm": ["non_scaling_norms"],
    "sqviz.quant.kept_sinks": ["keep_sinks"],
    "sqviz.quant.methods": ["Method", "table_3_2", "frontier"],
    "sqviz.quant.linear": ["quantize"],
    "sqviz.quant.precision_map": ["precision_map", "PrecisionMap"],
    "sqviz.quant.int8_cache": ["Int8Cache"],
    "sqviz.quant.export": ["export"],
    "sqviz.quant.checkpoint": ["save_int8", "load_int8"],
    "sqviz_kernels.dispatch": ["backends"],
    "sqviz.streaming.policies": ["Dense", "Window", "Sinks", "Recompute"],
    "sqviz.streaming.cache": ["SinkCache"],
    "sqviz.streaming.generate": ["stream_generate", "StreamStep"],
    "sqviz.streaming.perplexity": ["streaming_perplexity", "StreamPerplexity"],
    "sqviz.evaluation.perplexity": ["perplexity"],
    "sqviz.evaluation.evaluate": ["evaluate"],
    "sqviz.evaluation.result": ["Evaluation"],
    "sqviz.evaluation.items": ["Task", "choose"],
    "sqviz.evaluation.compare": ["compare"],
    "sqviz.evaluation.alpha_curve": ["alpha_curve"],
    "sqviz.evaluation.granularity_picture": ["show_granularity"],
    "sqviz.evaluation.footprint": ["footprint", "fewest_devices"],
    "sqviz.evaluation.policies": [
        "compare_policies",
        "four_policies",
        "sink_counts",
        "cache_sizes",
        "with_line_breaks",
    ],
    "sqviz.evaluation.answers": ["QuestionStream", "score_answers", "score_alone"],
    "sqviz.evaluation.streameval": ["streameval"],
    "sqviz.evaluation.arc_stream": ["arc_stream"],
    "sqviz.evaluation.stream_cost": ["stream_cost"],
    "sqviz.evaluation.sinks": ["sinks"],
    "sqviz.evaluation.model_cost": ["model_cost"],
    "sqviz.widgets.smoothing": ["explore_smoothing"],
    "sqviz.widgets.sink_explorer": ["explore_sinks"],
    "sqviz.widgets.stream_explorer": ["explore_stream"],
    "sqviz.progress": ["CancelToken"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'sqviz' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
