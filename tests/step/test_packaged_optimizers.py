"""Optimizers of bitsandbytes and torchao are found by name, or what is missing is named."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

import memfit
from memfit.errors import NotSimulatedError, UsageError
from memfit.step.timm_models import check_optimizer_name


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence has the command that installs it, also for timm's names of them."""
    find_spec = importlib.util.find_spec

    def without(name: str, *others: Any) -> Any:
        return None if name in ("bitsandbytes", "torchao") else find_spec(name, *others)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    for name in ("bnbadamw8bit", "bitsandbytes.PagedAdamW8bit", "torchao.AdamW4bit"):
        with pytest.raises(UsageError, match=r"needs (\w+), which is not installed: pip install"):
            check_optimizer_name(name)
    with pytest.raises(UsageError, match=r"bitsandbytes\.AdamW8bit and torchao\.AdamW8bit"):
        check_optimizer_name("adamw8bit")


@pytest.mark.needs("bitsandbytes")
def test_a_name_that_is_nearly_right_gets_the_right_ones() -> None:
    """A bare name with its bits is that of each package's class."""
    check_optimizer_name("bitsandbytes.PagedAdamW8bit")
    with pytest.raises(UsageError, match=r"did you mean bitsandbytes\.AdamW8bit"):
        check_optimizer_name("adamw8bit")
    with pytest.raises(UsageError, match=r"did you mean bitsandbytes\.PagedAdamW8bit"):
        check_optimizer_name("paged_adamw_8bit")
    with pytest.raises(UsageError, match="bitsandbytes has no optimizer 'AdamW9bit'; did you mean"):
        check_optimizer_name("bitsandbytes.AdamW9bit")
    with pytest.raises(UsageError, match="has kernels of its own: leave fused out"):
        memfit.estimate(
            "test_vit", 2, gpu="rtx3060", optimizer="bitsandbytes.AdamW8bit", fused=True
        )


@pytest.mark.needs("bitsandbytes")
def test_a_simulation_offers_the_rehearsal() -> None:
    """Their kernels run on a GPU only."""
    with pytest.raises(NotSimulatedError, match=r"own kernels run on a GPU only\. Rehearse it"):
        memfit.estimate("test_vit", 2, gpu="rtx3060", optimizer="bitsandbytes.Lion8bit")


def test_what_a_package_logs_when_it_is_imported_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """torchao makes torch warn. Before and after, both log as the user set them."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").touch()
    (tmp_path / "torchao" / "optim.py").write_text(
        "import logging, torch\n"
        "logging.getLogger('torch.utils._pytree').warning('outdated')\n"
        "class AdamW8bit(torch.optim.AdamW): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    logger = logging.getLogger("torch.utils._pytree")
    monkeypatch.setattr(logger, "propagate", True)
    logger.addHandler(caplog.handler)
    try:
        check_optimizer_name("torchao.AdamW8bit")
        assert not caplog.records
        logger.warning("afterwards")
    finally:
        logger.removeHandler(caplog.handler)
        monkeypatch.delitem(sys.modules, "torchao.optim", raising=False)
        monkeypatch.delitem(sys.modules, "torchao", raising=False)
    assert {record.getMessage() for record in caplog.records} == {"afterwards"}
