"""One run of a study: governor, plant and orders, step by step, and the best that could have been done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np

from hil.plant.eps import (
    FULL_CELL_V,
    NOMINAL_CELL_V,
    OCV_CELL_V,
    PowerSystem,
)
from hil.plant.thermal import HeatModel
from hil.study.cell import PLATFORM_W, RADIATOR, REFERENCE_ARRAY, Cell, battery, least_w
from hil.study.governors import Craft, PowerGovernor, View
from hil.study.world import BACKGROUND_VALUE, EPOCH_NS, NS_PER_S, STEP_S, Array, Order, Sky, orders, sky
from node.power.battery import BatteryModel, BatterySettings
from node.power.curve import PowerCurve
from node.power.forecast import UmbraPass
from node.power.lp import Demand, Problem, solve
from node.power.plan import Backlog
from node.power.wear import WearMeter
from telemetry.bus import BusEps

BOUND_STEPS: Final = 12
"""Steps of the simulation in a segment of the bound."""
TOLERANCE_SOC: Final = 1e-6


@dataclass(frozen=True)
class World:
    """The truth of a cell, computed once for all governors."""

    cell: Cell
    sky: Sky
    curve: PowerCurve
    irradiance: Array
    """With what the array has lost."""
    available_w: Array
    """What the array could give at each step."""
    array_sun_w: float
    """What the array gives in full sunlight, warm: the truth."""
    area_m2: float
    orders: tuple[Order, ...]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a governor made of a cell."""

    value: float
    tokens: float
    tokens_by_value: dict[str, float]
    bound: float
    """Value that a clairvoyant would have reached at most, ending with as much energy."""
    floor_violation_s: float
    soc_min: float
    deepest: float
    """Depth of the deepest cycle."""
    wear: float
    """Share of the battery's life used."""
    board_max_c: float
    payload_mean_w: float
    eclipse_mean_w: float
    mission_s: float
    cpu_s: float
    """Processor time of simulation and governor, without the bound."""
    plans: int = 0
    fallbacks: int = 0

    @property
    def speed_x(self) -> float:
        """Mission time by processor time."""
        return self.mission_s / self.cpu_s

    @property
    def percent(self) -> float:
        """Value as a percentage of the bound."""
        return 100.0 * self.value / self.bound if self.bound > 0 else 0.0


def world(cell: Cell, orbits: int, curve: PowerCurve) -> World:
    """Return the truth of a cell.

    Raises
    ------
    ValueError
        Its beta angle cannot be had.
    """
    above = sky(cell.beta_deg, orbits)
    rng = np.random.default_rng([cell.seed, 1])
    wanted_w = cell.ratio * (PLATFORM_W + curve.most_w)
    reference = PowerSystem(REFERENCE_ARRAY, battery(cell), PLATFORM_W)
    mean_w = float(np.mean(above.irradiance * above.cosine)) * reference.full_sun_w(
        1.0, REFERENCE_ARRAY.hot_c
    )
    area_m2 = REFERENCE_ARRAY.area_m2 * wanted_w / mean_w
    array = msgspec.structs.replace(REFERENCE_ARRAY, area_m2=area_m2)
    irradiance = above.irradiance.copy()
    irradiance[len(irradiance) // 3 :] *= 1.0 - cell.array_loss
    power = PowerSystem(array, battery(cell), PLATFORM_W)
    available = [
        power.advance(STEP_S, irradiance=light, cos_incidence=cosine, payload_w=0.0).array_available_w
        for light, cosine in zip(irradiance.tolist(), above.cosine.tolist(), strict=True)
    ]
    lit = above.irradiance > 0.9
    return World(
        cell=cell,
        sky=above,
        curve=curve,
        irradiance=irradiance,
        available_w=np.asarray(available),
        array_sun_w=power.full_sun_w(float(above.cosine[lit].mean()), array.hot_c)
        * float(above.irradiance[lit].mean()),
        area_m2=area_m2,
        orders=tuple(orders(above, curve.hull[-1].tokens_s, rng)),
    )


class _Book:
    """Open orders, and what was made of them."""

    def __init__(self, all_orders: tuple[Order, ...]) -> None:
        self._coming = sorted(all_orders, key=lambda each: each.arrives)
        self._next = 0
        self._open: list[list[float]] = []
        """Value, due step, tokens left; the best first."""
        self.changed = True
        self.value = 0.0
        self.by_value: dict[float, float] = {}

    def step(self, step: int) -> None:
        """Take what has arrived, drop what is overdue."""
        while self._next < len(self._coming) and self._coming[self._next].arrives <= step:
            each = self._coming[self._next]
            self._next += 1
            self._open.append([each.value, math.inf if each.due is None else each.due, each.tokens])
            self.changed = True
        if any(row[1] <= step or row[2] <= 0 for row in self._open):
            self._open = [row for row in self._open if row[1] > step and row[2] > 0]
            self.changed = True
        if self.changed:
            self._open.sort(key=lambda row: (-row[0], row[1]))

    def backlog(self) -> tuple[Backlog, ...]:
        """Return what is open, the work without end last."""
        listed = [
            Backlog(tokens=left, value=value, deadline_ns=EPOCH_NS + int(due) * STEP_S * NS_PER_S)
            for value, due, left in self._open
        ]
        return (*listed, Backlog(tokens=math.inf, value=BACKGROUND_VALUE))

    def serve(self, tokens: float, quota: tuple[float, ...] | None) -> None:
        """Spend tokens: as the plan has it, the rest by value and deadline."""
        if quota is not None and len(quota) == len(self._open) + 1:
            for row, rate in zip(self._open, quota, strict=False):
                tokens = self._give(row, min(rate * STEP_S, tokens), tokens)
        for row in self._open:
            if tokens <= 0:
                return
            tokens = self._give(row, tokens, tokens)
        self.value += BACKGROUND_VALUE * tokens
        self.by_value[BACKGROUND_VALUE] = self.by_value.get(BACKGROUND_VALUE, 0.0) + tokens

    def _give(self, row: list[float], most: float, tokens: float) -> float:
        given = min(most, row[2])
        row[2] -= given
        self.value += row[0] * given
        self.by_value[row[0]] = self.by_value.get(row[0], 0.0) + given
        return tokens - given


def run(world_: World, make: Callable[[Craft], PowerGovernor]) -> Outcome:
    """Return what a governor makes of a world, and what could have been made of it."""
    began_s = time.process_time()
    cell, above, curve = world_.cell, world_.sky, world_.curve
    rng = np.random.default_rng([cell.seed, 2])
    errors = cell.errors
    told_sun_w = world_.array_sun_w * (1.0 + errors.array * float(rng.standard_normal()))
    shift_ns = round(errors.edge_s * float(rng.standard_normal()) * NS_PER_S)
    soc_bias = 0.5 * errors.soc * float(rng.standard_normal())
    soc_noise = (errors.soc * rng.standard_normal(above.steps)).tolist()
    array_noise = (1.0 + errors.array_noise * rng.standard_normal(above.steps)).tolist()
    volts_bias = 2 * errors.cell_v * float(rng.standard_normal())
    volts_noise = (2 * errors.cell_v * rng.standard_normal(above.steps)).tolist()
    amps_gain = 1.0 + errors.amps * float(rng.standard_normal())
    passes = tuple(_shifted(each, shift_ns) for each in above.passes)
    craft = Craft(
        curve=curve,
        least_w=least_w(curve),
        period_s=above.period_s,
        soc_sigma=errors.soc,
        edge_margin_s=2.0 * errors.edge_s,
    )
    governor = make(craft)
    kept = battery(cell)
    power = PowerSystem(msgspec.structs.replace(REFERENCE_ARRAY, area_m2=world_.area_m2), kept, PLATFORM_W)
    heat = HeatModel(RADIATOR)
    book, wear = _Book(world_.orders), WearMeter()
    irradiance, cosine = world_.irradiance.tolist(), above.cosine.tolist()
    zenith, available = above.zenith.tolist(), world_.available_w.tolist()
    lines = curve.lines()
    state, payload_w, board_max_c, soc_min = power.state, least_w(curve), -273.15, kept.soc_start
    draws: list[float] = []
    following, tokens_total, jobs = 0, 0.0, book.backlog()
    capacity = cell.battery_wh
    for step in range(above.steps):
        t_ns = EPOCH_NS + step * STEP_S * NS_PER_S
        book.step(step)
        while following < len(passes) and passes[following].exit_ns <= t_ns:
            following += 1
        if book.changed:
            jobs = book.backlog()
        board_c = heat.board_c
        view = View(
            t_ns=t_ns,
            eps=BusEps(
                t_ns=t_ns,
                battery_soc=min(max(state.battery_soc + soc_bias + soc_noise[step], 0.0), 1.0),
                battery_v=state.battery_v + volts_bias + volts_noise[step],
                battery_a=state.battery_a * amps_gain,
                battery_wh=capacity,
                array_w=max(0.0, state.array_w * array_noise[step]),
                array_sun_w=told_sun_w,
                platform_w=PLATFORM_W,
                soc_floor=kept.soc_floor,
            ),
            umbra=passes[following] if following < len(passes) else None,
            passes=passes[following : following + 5],
            jobs=jobs if not book.changed else book.backlog(),
            new_jobs=book.changed,
            board_c=board_c,
            load_w=payload_w,
        )
        book.changed = False
        payload_w = governor.watts(view)
        state = power.advance(
            STEP_S, irradiance=irradiance[step], cos_incidence=cosine[step], payload_w=payload_w
        )
        heat.advance(STEP_S, irradiance=irradiance[step], sun_above_earth=zenith[step], payload_w=payload_w)
        rate = max(0.0, min(slope * payload_w + offset for slope, offset in lines))
        tokens_total += rate * STEP_S
        book.serve(rate * STEP_S, governor.quota())
        draws.append(payload_w)
        board_max_c = max(board_max_c, board_c)
        soc_min = min(soc_min, state.battery_soc)
        wear.take(state.battery_soc)
    cpu_s = time.process_time() - began_s
    drawn = np.asarray(draws)
    dark = np.asarray(available) < 1e-9
    return Outcome(
        value=book.value,
        tokens=tokens_total,
        tokens_by_value={f"{value:g}": tokens for value, tokens in sorted(book.by_value.items())},
        bound=bound(world_, state.battery_soc),
        floor_violation_s=state.below_floor_s,
        soc_min=soc_min,
        deepest=wear.deepest,
        wear=wear.wear,
        board_max_c=board_max_c,
        payload_mean_w=float(drawn.mean()),
        eclipse_mean_w=float(drawn[dark].mean()) if bool(dark.any()) else float("nan"),
        mission_s=float(above.steps * STEP_S),
        cpu_s=cpu_s,
        plans=getattr(governor, "plans", 0),
        fallbacks=getattr(governor, "fallbacks", 0),
    )


def bound(world_: World, soc_end: float) -> float:
    """Return the most value that any governor could have reached, ending at a state of charge.

    Every relaxation is to the good side: all is known beforehand, the battery has no resistance and charges
    as fast as its current limit allows at any voltage, draws are free between bare service and the most,
    segments of two minutes net charge against discharge, and orders begin and end with whole segments.
    """
    cell, above, curve = world_.cell, world_.sky, world_.curve
    kept = battery(cell)
    cells = BatteryModel(
        BatterySettings(open_circuit_cell_v=OCV_CELL_V, cells_in_series=kept.cells_in_series)
    )
    count = math.ceil(above.steps / BOUND_STEPS)
    padded = np.full(count * BOUND_STEPS, np.nan)
    padded[: above.steps] = world_.available_w
    grouped = padded.reshape(count, BOUND_STEPS)
    dt_s = STEP_S * np.sum(~np.isnan(grouped), axis=1).astype(np.float64)
    amps = kept.max_charge_c_rate * kept.capacity_wh / (NOMINAL_CELL_V * kept.cells_in_series)
    demands = [
        Demand(
            each.tokens,
            each.value,
            first=each.arrives // BOUND_STEPS,
            last=None if each.due is None else (each.due - 1) // BOUND_STEPS,
        )
        for each in world_.orders
    ]
    floor_j = cells.energy_j(kept.soc_floor, kept.capacity_wh)
    problem = Problem(
        dt_s=dt_s,
        array_w=np.nanmean(grouped, axis=1),
        platform_w=np.full(count, PLATFORM_W),
        least_w=np.full(count, least_w(curve)),
        most_w=np.full(count, curve.most_w),
        start_j=cells.energy_j(kept.soc_start, kept.capacity_wh),
        floor_j=np.full(count, floor_j),
        full_j=cells.energy_j(1.0, kept.capacity_wh),
        charge_efficiency=kept.charge_conversion * kept.coulombic_efficiency,
        discharge_efficiency=kept.discharge_conversion,
        charge_w=amps * FULL_CELL_V * kept.cells_in_series / kept.charge_conversion,
        curve=curve.lines(),
        demands=[*demands, Demand(math.inf, BACKGROUND_VALUE)],
        end_j=max(floor_j, cells.energy_j(min(soc_end, 1.0), kept.capacity_wh) * (1 - TOLERANCE_SOC)),
        early=0.0,
        taste=0.0,
    )
    return solve(problem, time_limit_s=60.0).value


def _shifted(umbra: UmbraPass, by_ns: int) -> UmbraPass:
    return UmbraPass(
        penumbra_entry_ns=umbra.penumbra_entry_ns + by_ns,
        entry_ns=umbra.entry_ns + by_ns,
        exit_ns=umbra.exit_ns + by_ns,
        penumbra_exit_ns=umbra.penumbra_exit_ns + by_ns,
    )
