"""Energy from a meter, and nothing where there is none."""

from __future__ import annotations

import importlib.util

import pytest

from secateur.errors import UsageError
from secateur.measure import energy

pytest.importorskip("codecarbon", reason="codecarbon is not installed")


@pytest.fixture
def counter(tmp_path):
    """The folder that a processor with RAPL shows, and a function that sets its counter (microjoules)."""
    package = tmp_path / "intel-rapl" / "intel-rapl:0"
    package.mkdir(parents=True)
    (package / "name").write_text("package-0\n")
    (package / "max_energy_range_uj").write_text("262143328850\n")

    def count(microjoules: int) -> None:
        (package / "energy_uj").write_text(f"{microjoules}\n")

    count(0)
    return tmp_path, count


def meter_of(folder):
    from codecarbon.core.cpu import IntelRAPL

    return energy.Meter(IntelRAPL(rapl_dir=str(folder)))


def test_joules_are_what_the_counter_went_on(counter):
    folder, count = counter
    count(5_000_000)
    meter = meter_of(folder)
    meter.start()
    count(17_500_000)
    assert meter.joules() == pytest.approx(12.5)
    count(18_000_000)
    assert meter.joules() == pytest.approx(0.5)
    assert meter.source == "RAPL of the processor"


def test_starting_again_forgets_what_was_before(counter):
    folder, count = counter
    meter = meter_of(folder)
    meter.start()
    count(9_000_000)
    meter.start()
    count(10_000_000)
    assert meter.joules() == pytest.approx(1.0)


def test_a_counter_that_wraps_around_goes_on(counter):
    folder, count = counter
    count(262_143_000_000)
    meter = meter_of(folder)
    meter.start()
    count(671_150)
    assert meter.joules() == pytest.approx(1.0)


def test_graphics_cards_are_added(counter):
    from codecarbon.core.units import Energy

    folder, count = counter

    class Cards:
        def start(self):
            pass

        def get_delta(self, duration):
            return [{"delta_energy_consumption": Energy.from_energy(kWh=1e-6)} for _ in range(2)]

    meter = meter_of(folder)
    both = energy.Meter(meter._processor, Cards())
    both.start()
    count(1_000_000)
    assert both.joules() == pytest.approx(1.0 + 2 * 3.6)
    assert "graphics cards" in both.source


def test_without_a_counter_there_is_a_reason_and_no_guess(monkeypatch):
    monkeypatch.setattr("codecarbon.core.cpu.is_rapl_available", lambda *_: False)
    meter, why = energy.find_meter()
    assert meter is None
    assert "no energy meter" in why


def test_cards_are_metered_alone_where_the_processor_has_no_counter(monkeypatch):
    monkeypatch.setattr("codecarbon.core.cpu.is_rapl_available", lambda *_: False)
    monkeypatch.setattr("codecarbon.core.gpu.is_gpu_details_available", lambda *_: True)
    monkeypatch.setattr("codecarbon.core.gpu.AllGPUDevices", lambda: "cards")
    meter, why = energy.find_meter("cuda:0")
    assert why == ""
    assert not meter.sees_processor
    assert "without the processor" in meter.source
    monkeypatch.setattr("codecarbon.core.gpu.is_gpu_details_available", lambda *_: False)
    meter, why = energy.find_meter("cuda:0")
    assert meter is None
    assert "graphics card" in why


def test_without_codecarbon_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    meter, why = energy.find_meter()
    assert meter is None
    assert "codecarbon is not installed" in why


def test_carbon_is_that_of_the_country():
    from codecarbon.input import DataSource

    mix = DataSource().get_global_energy_mix_data()
    for code in ("FRA", "POL"):
        found = energy.carbon_of(code.lower())
        assert found.region == code
        assert found.grams_per_joule * 3.6e6 == pytest.approx(mix[code]["carbon_intensity"], rel=1e-6)
        assert found.source.endswith(mix[code]["country_name"])


def test_an_unknown_country_is_refused():
    with pytest.raises(UsageError, match="no country 'XYZ'"):
        energy.carbon_of("XYZ")
