"""Do accumulated gradients equal the full batch's, family by family of timm?

    python benchmarks/equivalence.py [MODEL ...]

One small model of each family, with weights from `timm.create_model(pretrained=False)`, runs as it
trains in fp32. Then it runs in bf16 autocast, with the layers that mix samples frozen. The table
goes to the standard output, each row when it is done.
"""

from __future__ import annotations

import datetime as dt
import platform
import sys
import warnings

import timm
import torch

from memfit.equivalence import verify
from memfit.records import Equivalence, Precision, StepOptions
from memfit.step.training_step import TrainingStep

MICRO_BATCH_SIZE = 4
ACCUMULATION_STEPS = 2
NUM_CLASSES = 10

# Family, a small model of it, and the smallest image that it takes without trouble.
FAMILIES = (
    ("byobnet", "test_byobnet", 64),
    ("cait", "cait_xxs24_224", 64),
    ("coat", "coat_lite_tiny", 64),
    ("convit", "convit_tiny", 64),
    ("convnext", "convnext_atto", 64),
    ("cspnet", "cs3darknet_focus_s", 64),
    ("deit", "deit_tiny_patch16_224", 64),
    ("densenet", "densenet121", 64),
    ("dla", "dla46_c", 64),
    ("dpn", "dpn48b", 64),
    ("edgenext", "edgenext_xx_small", 64),
    ("efficientformer", "efficientformer_l1", 224),
    ("efficientformer_v2", "efficientformerv2_s0", 64),
    ("efficientnet", "test_efficientnet", 64),
    ("efficientvit_mit", "efficientvit_b0", 64),
    ("efficientvit_msra", "efficientvit_m0", 224),
    ("fasternet", "fasternet_t0", 64),
    ("fastvit", "fastvit_t8", 64),
    ("ghostnet", "ghostnet_050", 64),
    ("hgnet", "hgnetv2_b0", 64),
    ("hrnet", "hrnet_w18_small", 64),
    ("inception_next", "inception_next_atto", 64),
    ("inception_v3", "inception_v3", 96),
    ("levit", "levit_128s", 224),
    ("mambaout", "test_mambaout", 64),
    ("maxxvit", "coatnet_pico_rw_224", 64),
    ("metaformer", "poolformer_s12", 64),
    ("mlp_mixer", "mixer_s32_224", 224),
    ("mobilenetv3", "mobilenetv3_small_050", 64),
    ("mobilevit", "mobilevit_xxs", 64),
    ("mvitv2", "mvitv2_tiny", 64),
    ("nfnet", "test_nfnet", 64),
    ("pit", "pit_ti_224", 224),
    ("pvt_v2", "pvt_v2_b0", 64),
    ("rdnet", "rdnet_tiny", 64),
    ("regnet", "regnetx_002", 64),
    ("repghost", "repghostnet_050", 64),
    ("repvit", "repvit_m0_9", 64),
    ("res2net", "res2net50_48w_2s", 64),
    ("resnest", "resnest14d", 64),
    ("resnet", "test_resnet", 64),
    ("resnetv2", "resnetv2_50x1_bit", 64),
    ("rexnet", "rexnet_100", 64),
    ("sequencer", "sequencer2d_s", 64),
    ("starnet", "starnet_s050", 64),
    ("swiftformer", "swiftformer_xs", 64),
    ("tiny_vit", "tiny_vit_5m_224", 64),
    ("twins", "twins_pcpvt_small", 64),
    ("visformer", "visformer_tiny", 224),
    ("vision_transformer", "test_vit", 64),
    ("vision_transformer_relpos", "test_vit_relpos", 64),
    ("volo", "volo_d1_224", 64),
    ("vovnet", "ese_vovnet19b_slim_dw", 64),
    ("xception_aligned", "xception41p", 64),
    ("xcit", "xcit_nano_12_p16_224", 64),
    # Those that take longest come last.
    ("byoanet", "eca_botnext26ts_256", 64),
    ("davit", "davit_tiny", 64),
    ("focalnet", "focalnet_tiny_srf", 64),
    ("eva", "eva02_tiny_patch14_224", 56),
)

HEADER = (
    "| family | model | image | as it trains | layers that mix | fp64 | fp32 | frozen | fp64 |"
    " bf16 autocast | seconds |\n"
    "|---|---|--:|---|---|--:|--:|---|--:|--:|--:|"
)


def main() -> None:
    """Print the table for the families asked for, or for all."""
    torch.set_num_threads(1)  # the models are small: more threads would wait for each other
    wanted = set(sys.argv[1:])
    print(
        f"{platform.machine()}, {torch.get_num_threads()} CPU thread, torch {torch.__version__}, "
        f"timm {timm.__version__}, {dt.datetime.now(dt.timezone.utc):%Y-%m-%d}; "
        f"{ACCUMULATION_STEPS} micro-batches of {MICRO_BATCH_SIZE}\n"
    )
    print(HEADER, flush=True)
    for family, model, side in FAMILIES:
        if not wanted or {family, model} & wanted:
            print(_row(family, model, side), flush=True)


def _row(family: str, model: str, side: int) -> str:
    plain = _verified(model, side, Precision.FP32, freeze_bn=False)
    mixes = bool(plain.mixing_layers)
    rounded = _verified(model, side, Precision.AMP_BF16, freeze_bn=mixes)
    cells = (
        family,
        model,
        str(side),
        plain.verdict.value,
        f"{len(plain.mixing_layers)}, first `{plain.mixing_layers[0].name}`" if mixes else "none",
        _error(plain, "fp64"),
        _error(plain, "fp32"),
        rounded.verdict.value if mixes else "",
        _error(rounded, "fp64") if mixes else "",
        f"{rounded.verdict.value}, {_error(rounded, 'amp-bf16')}{_noise(rounded)}",
        f"{plain.seconds + rounded.seconds:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def _error(result: Equivalence, precision: str) -> str:
    error = result.worst_relative_error(precision)
    return "" if error is None else f"{error:.1e}"


def _noise(result: Equivalence) -> str:
    noisy = max(result.checks, key=lambda check: check.noise or 0.0)
    if noisy.noise is None:
        return ""
    return f"; {noisy.num_in_noise} of {noisy.num_parameters} in noise, {noisy.noise:.1e}"


def _verified(model: str, side: int, precision: Precision, *, freeze_bn: bool) -> Equivalence:
    options = StepOptions(precision=precision, image_size=(side, side), num_classes=NUM_CLASSES)
    step = TrainingStep(subject=model, options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm, about names that it renamed
        return verify(
            step,
            torch.device("cpu"),
            micro_batch_size=MICRO_BATCH_SIZE,
            accumulation_steps=ACCUMULATION_STEPS,
            freeze_bn=freeze_bn,
        )


if __name__ == "__main__":
    main()
