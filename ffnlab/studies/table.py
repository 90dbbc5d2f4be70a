"""The table of studies. A new study joins by one entry."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["STUDIES", "Paper", "Study"]


class Paper(NamedTuple):
    """What a study is about.

    Attributes:
      title: of the paper.
      year: in which it first appeared.
      link: where it can be read.
    """

    title: str
    year: int
    link: str


@dataclasses.dataclass(frozen=True)
class Study:
    """An entry of the table.

    Attributes:
      slug: name on the command line.
      name: of the system.
      package: sub-package that holds the method.
      title: what it does, in one line.
      paper: None of a study that compares systems.
    """

    slug: str
    name: str
    package: str
    title: str
    paper: Paper | None

    @property
    def module(self) -> str:
        """Dotted name of the module with `run`."""
        return f"ffnlab.studies.{self.slug.replace('-', '_')}"


def arxiv(number: str, year: int, title: str) -> Paper:
    """A paper by its number on arXiv."""
    return Paper(title, year, f"https://arxiv.org/abs/{number}")


STUDIES: Mapping[str, Study] = MappingProxyType(
    {
        study.slug: study
        for study in (
            Study(
                "finercut",
                "FinerCut",
                "pruning",
                "removes attention and FFN sublayers, one by one, by their effect on the output",
                arxiv(
                    "2405.18218",
                    2024,
                    "FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models",
                ),
            ),
            Study(
                "chess",
                "CHESS",
                "sparsity",
                "drops small FFN activations by channel-wise thresholds, and skips their rows when "
                "decoding",
                arxiv(
                    "2409.01366",
                    2024,
                    "CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective "
                    "Sparsification",
                ),
            ),
            Study(
                "fireq",
                "FireQ",
                "quantization",
                "INT4 weights and KV cache, FP8 activations and queries, RoPE-aware scales",
                arxiv(
                    "2505.20839",
                    2025,
                    "FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference "
                    "Acceleration",
                ),
            ),
            Study(
                "noprop",
                "NoProp",
                "learning",
                "a rule: blocks that denoise a class, each trained alone",
                arxiv(
                    "2503.24322",
                    2025,
                    "NoProp: Training Neural Networks without Back-propagation or "
                    "Forward-propagation",
                ),
            ),
            Study(
                "counter-current",
                "Counter-current learning",
                "learning",
                "a rule: two networks run against each other, local losses only",
                arxiv(
                    "2409.19841",
                    2024,
                    "Counter-Current Learning: A Biologically Plausible Dual Network Approach for "
                    "Deep Learning",
                ),
            ),
            Study(
                "dann",
                "DANN",
                "learning",
                "a rule: features that tell classes and hide the domain, by a reversed gradient",
                arxiv("1505.07818", 2015, "Domain-Adversarial Training of Neural Networks"),
            ),
            Study(
                "exact-permutations",
                "Exact permutations",
                "learning",
                "ensembles of wide networks that send all binary inputs through a permutation "
                "learned from its basis",
                arxiv(
                    "2502.16763",
                    2025,
                    "Exact Learning of Permutations for Nonzero Binary Inputs with Logarithmic "
                    "Training Size and Quadratic Ensemble Complexity",
                ),
            ),
            Study(
                "physical-ff",
                "Physical local learning",
                "learning",
                "a rule: layers behind physical systems that are asked and never differentiated, "
                "each trained alone by right and wrong classes",
                arxiv(
                    "2304.11042",
                    2023,
                    "Backpropagation-free Training of Deep Physical Neural Networks",
                ),
            ),
            Study(
                "forward-gnn",
                "ForwardGNN",
                "learning",
                "a rule: layers of a graph network that each learn alone, to resemble the virtual "
                "node of a class",
                arxiv("2403.11004", 2024, "Forward Learning of Graph Neural Networks"),
            ),
            Study(
                "lamb",
                "LAMB",
                "learning",
                "an optimizer for large batches: steps as long as the weights they change",
                arxiv(
                    "1904.00962",
                    2019,
                    "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
                ),
            ),
            Study(
                "gradient-noise",
                "Gradient noise",
                "learning",
                "an optimizer piece that frees badly initialised deep networks",
                arxiv(
                    "1511.06807",
                    2015,
                    "Adding Gradient Noise Improves Learning for Very Deep Networks",
                ),
            ),
            Study(
                "duo-llm",
                "Duo-LLM",
                "routing",
                "a small FFN beside each big one: what an oracle's choice for each token gains, "
                "and what a trained router's",
                arxiv(
                    "2410.10846",
                    2024,
                    "Duo-LLM: A Framework for Studying Adaptive Computation in Large Language "
                    "Models",
                ),
            ),
            Study(
                "mixture-of-transformers",
                "Mixture-of-Transformers",
                "routing",
                "a copy of FFN, projections and norms for each modality, and one attention: the "
                "work of a token stays",
                arxiv(
                    "2411.04996",
                    2024,
                    "Mixture-of-Transformers: A Sparse and Scalable Architecture for Multi-Modal "
                    "Foundation Models",
                ),
            ),
            Study(
                "lora-mixer",
                "LoRA-Mixer",
                "routing",
                "adapters of several tasks inside the linear maps, mixed for each token by routers",
                arxiv(
                    "2507.00029",
                    2025,
                    "LoRA-Mixer: Coordinate Modular LoRA Experts Through Serial Attention Routing",
                ),
            ),
            Study(
                "pal",
                "PAL",
                "routing",
                "lets a decoder hear: audio as keys and values of attention, which no FFN sees",
                arxiv(
                    "2506.10423",
                    2025,
                    "PAL: Probing Audio Encoders via LLMs - A Study of Information Transfer from "
                    "Audio Encoders to LLMs",
                ),
            ),
            Study(
                "robust-qa-moe",
                "Robust QA",
                "routing",
                "span answers by a mixture of experts on an encoder, two experts a token or Switch "
                "blocks, with augmented questions",
                arxiv(
                    "2204.09598",
                    2022,
                    "Build a Robust QA System with Transformer-based Mixture of Experts",
                ),
            ),
            Study(
                "pflayer",
                "PfLayer",
                "structure",
                "a maximum over neighbours, which learns nothing, for convolutions and attention",
                arxiv("2202.02777", 2022, "Learning Features with Parameter-Free Layers"),
            ),
            Study(
                "learngene-sws",
                "Learngene SWS",
                "structure",
                "layers that share their block within a stage, taught once, expanded to any depth",
                arxiv(
                    "2404.16897",
                    2024,
                    "Exploring Learngene via Stage-wise Weight Sharing for Initializing "
                    "Variable-sized Models",
                ),
            ),
            Study(
                "revcol",
                "RevCol",
                "structure",
                "columns that are undone: training memory does not grow with their number",
                arxiv("2212.11696", 2022, "Reversible Column Networks"),
            ),
            Study(
                "repavit",
                "RePaViT",
                "structure",
                "FFNs of which most channels idle while they train, folded into half the weights",
                arxiv(
                    "2505.21847",
                    2025,
                    "RePaViT: Scalable Vision Transformer Acceleration via Structural "
                    "Reparameterization on Feedforward Network Layers",
                ),
            ),
            Study(
                "snnk",
                "SNNK",
                "structure",
                "random features of inputs times features of weights, in place of a layer and its "
                "nonlinearity",
                arxiv("2310.13225", 2023, "Scalable Neural Network Kernels"),
            ),
            Study(
                "structured-ffn",
                "Structured FFNs",
                "structure",
                "FFNs of thin products and of blocks, guided by dense companions while they learn",
                arxiv(
                    "2406.16450",
                    2024,
                    "Building on Efficient Foundations: Effectively Training LLMs with Structured "
                    "Feedforward Layers",
                ),
            ),
            Study(
                "macaron",
                "Macaron Net",
                "structure",
                "half an FFN on either side of the attention, for two-slot blocks of any model",
                arxiv(
                    "1906.02762",
                    2019,
                    "Understanding and Improving Transformer From a Multi-Particle Dynamic System "
                    "Point of View",
                ),
            ),
            Study(
                "scalelong",
                "ScaleLong",
                "structure",
                "long skips of a U-shaped network, scaled by falling powers or by small gates: a "
                "U-ViT that draws digits",
                arxiv(
                    "2310.13545",
                    2023,
                    "ScaleLong: Towards More Stable Training of Diffusion Model via Scaling "
                    "Network Long Skip Connection",
                ),
            ),
            Study(
                "hypernet-review",
                "Hypernetworks",
                "learning",
                "a model that gives the weights of any other: by tasks, data or noise, in one "
                "piece or in many",
                arxiv("2306.06955", 2023, "A Brief Review of Hypernetworks in Deep Learning"),
            ),
            Study(
                "dp-hypernet",
                "Dependency preserving hypernetworks",
                "learning",
                "a rule: a hypernetwork learns tasks one after the other, and what it gave for "
                "each stays",
                arxiv(
                    "2209.07712",
                    2022,
                    "Continual Learning with Dependency Preserving Hypernetworks",
                ),
            ),
            Study(
                "linear-interpreter",
                "Linear interpreters",
                "analysis",
                "any function as the affine map that one input's decisions leave of it: votes, "
                "constants, bases",
                arxiv(
                    "1908.05168",
                    2019,
                    "A Tour of Convolutional Networks Guided by Linear Interpreters",
                ),
            ),
            Study(
                "information-plane",
                "Information plane",
                "analysis",
                "what layers know of their input and of the answer, counted over a finite world",
                arxiv(
                    "1703.00810",
                    2017,
                    "Opening the Black Box of Deep Neural Networks via Information",
                ),
            ),
            Study(
                "adaptive-mi",
                "Adaptive information estimators",
                "analysis",
                "information by cells and kernels that follow what a layer does at the time",
                arxiv(
                    "1902.09037",
                    2019,
                    "Adaptive Estimators Show Information Compression in Deep Neural Networks",
                ),
            ),
            Study(
                "safety-verification",
                "Safety verification",
                "analysis",
                "whether any point around an input gets another class: a witness, a proof, or "
                "unknown",
                arxiv("1610.06940", 2016, "Safety Verification of Deep Neural Networks"),
            ),
            Study(
                "learning-rules",
                "Learning rules",
                "learning",
                "rules side by side: accuracy, memory and work of a step, and its direction "
                "against the gradient",
                None,
            ),
        )
    }
)
