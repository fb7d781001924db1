"""Energy by a meter that exists: the processor's own counter (RAPL) or a graphics card's, read through codecarbon.

Where there is none, nothing is guessed: codecarbon would go on with an estimate from the processor's name, which says
nothing about what ran.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from dataclasses import dataclass
from typing import Any

from secateur.errors import UsageError

PACKAGE = "codecarbon"
INSTALL = "pip install 'secateur[energy]'"
_JOULES = 3.6e6
"""In a kWh, the unit in which codecarbon counts."""


class Meter:
    """Reads the counters of a machine; energy of everything that runs on it."""

    def __init__(self, processor: Any = None, cards: Any = None) -> None:
        """
        Args:
            processor: codecarbon's ``IntelRAPL``, or what behaves like it.
            cards: codecarbon's ``AllGPUDevices``, or what behaves like it.
        """
        self._processor, self._cards = processor, cards
        self._started = 0.0

    @property
    def sees_processor(self) -> bool:
        """Whether work on the processor is in what it counts."""
        return self._processor is not None

    @property
    def source(self) -> str:
        """What is read, in words."""
        parts = ["RAPL of the processor"] if self._processor is not None else []
        told = " and ".join(parts + (["the counters of all graphics cards"] if self._cards is not None else []))
        return told if self.sees_processor else f"{told}, without the processor, which has no meter that can be read"

    def start(self) -> None:
        """Begin anew."""
        for part in (self._processor, self._cards):
            if part is not None:
                part.start()
        self._started = time.perf_counter()

    def joules(self) -> float:
        """Energy since `start`, or since it was asked last."""
        from codecarbon.core.units import Time

        now = time.perf_counter()
        duration, self._started = Time(now - self._started), now
        total = 0.0
        if self._processor is not None:
            found = self._processor.get_cpu_details(duration)
            total += sum(value for name, value in found.items() if "Energy" in name)
        if self._cards is not None:
            total += sum(float(card["delta_energy_consumption"].kWh) for card in self._cards.get_delta(duration))
        return total * _JOULES


def find_meter(device: str = "cpu") -> tuple[Meter | None, str]:
    """The meter of this machine, or None and the reason.

    Args:
        device: what the model runs on; graphics cards are metered as well then, and must be. Where the processor beside
            them has no meter, theirs is told alone, and `Meter.source` says so.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        return None, f"{PACKAGE} is not installed ({INSTALL})"
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    from codecarbon.core.cpu import IntelRAPL, is_rapl_available
    from codecarbon.core.gpu import AllGPUDevices, is_gpu_details_available

    processor = IntelRAPL() if is_rapl_available() else None
    if device.startswith("cuda"):
        if not is_gpu_details_available():
            return None, "the graphics card has no energy counter that can be read"
        return Meter(processor, AllGPUDevices()), ""
    if processor is None:
        return None, "this machine has no energy meter that can be read (no RAPL in /sys/class/powercap)"
    return Meter(processor), ""


@dataclass(frozen=True)
class Carbon:
    """How much carbon dioxide the electricity of a country stands for."""

    region: str
    grams_per_joule: float
    source: str


def carbon_of(region: str) -> Carbon:
    """The electricity of a country, by codecarbon's table.

    Args:
        region: three letters of ISO 3166, such as FRA.

    Raises:
        UsageError: when codecarbon is not installed or has no such country.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise UsageError(f"--region needs {PACKAGE}", hint=INSTALL)
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    table = DataSource()
    code = region.upper()
    mix = table.get_global_energy_mix_data()
    if code not in mix:
        raise UsageError(
            f"there is no country '{region}' in {PACKAGE}'s table", hint="give its three letters: FRA, USA"
        )
    geo = GeoMetadata(country_iso_code=code, country_name=str(mix[code].get("country_name", code)))
    kilograms = Emissions(table).get_country_emissions(Energy.from_energy(kWh=1.0), geo)
    return Carbon(code, kilograms * 1000 / _JOULES, f"{PACKAGE}'s table of the electricity of {geo.country_name}")
