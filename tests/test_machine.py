import pytest

from vlm_local import machine
from vlm_local.machine import TOKENS_PER_STEP, DeviceRates, examine, measure_free_memory
from vlm_local.registry import MODELS


def test_free_memory_stays_within_a_containers_limit(tmp_path, monkeypatch):
    assert measure_free_memory("cpu") > 0
    for name, text in (("memory.max", "5000"), ("memory.current", "3000"), ("memory.stat", "inactive_file 500\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert measure_free_memory("cpu") == 2500
    (tmp_path / "memory.max").write_text("max\n")
    assert measure_free_memory("cpu") > 2500


def test_a_step_is_bound_by_arithmetic_or_by_memory():
    rates = DeviceRates(1e9, 2 * 1000 * TOKENS_PER_STEP)
    assert rates.find_least_ms(1000, 1.0, TOKENS_PER_STEP) == pytest.approx(1000)
    assert DeviceRates(50.0, 1e12).find_least_ms(1, 100.0, TOKENS_PER_STEP) == pytest.approx(2000)


def test_a_machine_is_examined_to_the_end(monkeypatch):
    monkeypatch.setattr(machine, "_measure_rates", lambda device, dtype: DeviceRates(1e10, 1e12))
    monkeypatch.setattr(machine, "measure_free_memory", lambda device: int(5e9))
    findings = {finding.name: finding for finding in examine()}
    assert {"python", "torch", "bitsandbytes", "memory", "disk", "embedded checkpoint", "speed"} <= set(findings)
    assert {model.name for model in MODELS[1:]} <= set(findings)
    assert findings["smolvlm2-256m"].verdict == "ok" and "steps/s" in findings["smolvlm2-256m"].text
    assert "bfloat16 needs 68.4 GB" in findings["qwen3-vl-30b-a3b"].text  # --quantize is not for it
    assert "--quantize 4bit" in findings["qwen2-vl-7b"].text or findings["qwen2-vl-7b"].verdict == "warn"


def test_a_missing_package_is_named_with_its_mend(monkeypatch):
    monkeypatch.setattr(machine, "_PACKAGES", (("no-such-package", "pip install it"),))
    monkeypatch.setattr(machine, "_measure_rates", lambda device, dtype: DeviceRates(1e10, 1e12))
    (finding,) = (each for each in examine() if each.name == "no-such-package")
    assert finding.verdict == "FAIL" and "pip install it" in str(finding)


def test_a_gpu_that_torch_cannot_use_is_a_failure(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(machine, "_ask_driver", lambda: ["NVIDIA X, 550.1"])
    ((finding, device),) = machine._check_gpus()
    assert finding.verdict == "FAIL" and "NVIDIA X" in finding.text and device is None
