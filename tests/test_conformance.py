"""Every loss gives one gradient, however its samples are laid out; a loss that does not is found out."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.algorithms import PRESETS
from posttrain.conformance import LAYOUTS, check, main
from posttrain.recipe import AlgorithmSection

# A mean over the microbatch: the mistake this suite is for.
BROKEN = """
from posttrain.policy_losses import clipped

def loss(tokens, *, epsilon_low, epsilon_high):
    loss_RW, metrics = clipped(tokens, epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    return loss_RW / tokens.mask_RW.sum().clamp(min=1), metrics
"""


@pytest.mark.slow
def test_every_preset_and_correction_on_one_and_two_ranks() -> None:
    sections = {name: AlgorithmSection.model_validate(name) for name in PRESETS}
    sections["corrected"] = AlgorithmSection(
        importance="mask",
        importance_cap=1.2,
        importance_floor=0.8,
        entropy_coef=0.01,
        beta=0.1,
        off_policy_threshold=0.05,
    )
    findings = check(sections, ranks=(1, 2))
    assert len(findings) == len(sections) * len(LAYOUTS) * 2
    assert [finding for finding in findings if not finding.is_equal] == []
    # The samples are such that something is clipped or masked: layouts agree on more than a plain sum.
    assert max(finding.error for finding in findings) > 0


def test_a_loss_that_depends_on_its_microbatch_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_loss.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert main(["broken_loss:loss", "--ranks", "1"]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "differs: all side by side" in output and "decided for the whole minibatch" in output


def test_unknown_losses_and_ranks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clipp"]) == 2
    assert "choose one of clip" in capsys.readouterr().err
    assert main(["clip", "--ranks", "2"]) == 2
    assert "must hold 1" in capsys.readouterr().err
