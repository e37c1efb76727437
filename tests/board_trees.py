"""Trees of files as boards have them under `/sys`, `/etc` and `/proc`, by their documented layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

ZONES_ORIN = {"cpu-thermal": 46_000, "gpu-thermal": 46_700, "soc0-thermal": 46_200, "tj-thermal": 47_000}

CONF = """\
# by hand, in the format of nvpmodel
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
CPU_ONLINE CORE_1 1
GPU MAX_FREQ 612000000
EMC MAX_FREQ 2133000000
< POWER_MODEL ID=1 NAME=25W >
CPU_ONLINE CORE_0 1
CPU_ONLINE CORE_1 1
GPU MAX_FREQ 918000000
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
CPU_ONLINE CORE_0 1
CPU_ONLINE CORE_1 1
GPU MAX_FREQ -1
< POWER_MODEL ID=3 NAME=10W >
CPU_ONLINE CORE_0 1
CPU_ONLINE CORE_1 0
GPU MAX_FREQ 408000000
< PM_CONFIG DEFAULT=1 >
"""


def write(root: Path, files: Mapping[str, object]) -> Path:
    """Write files by their absolute names."""
    for name, content in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def ina(number: int, rails: Mapping[str, tuple[int, int]]) -> dict[str, object]:
    """Return the files of an INA3221: (mV, mA) by label."""
    here = f"/sys/class/hwmon/hwmon{number}"
    files: dict[str, object] = {f"{here}/name": "ina3221", f"{here}/in7_label": "sum of shunt voltages"}
    for n, (label, (milli_v, milli_a)) in enumerate(rails.items(), 1):
        files |= {
            f"{here}/in{n}_label": label.split("#")[0],
            f"{here}/in{n}_enable": 1,
            f"{here}/in{n}_input": milli_v,
            f"{here}/curr{n}_input": milli_a,
        }
    return files


def zones(temperatures: Mapping[str, int]) -> dict[str, object]:
    """Return the files of thermal zones, milli-degC by type."""
    files: dict[str, object] = {}
    for n, (kind, milli_c) in enumerate(temperatures.items()):
        files |= {
            f"/sys/class/thermal/thermal_zone{n}/type": kind,
            f"/sys/class/thermal/thermal_zone{n}/temp": milli_c,
        }
    return files


def gpu(path: str, node: str, now_hz: int, max_hz: int) -> dict[str, object]:
    """Return the files of a GPU in devfreq."""
    here = f"/sys/class/devfreq/{path}"
    return {
        f"{here}/cur_freq": now_hz,
        f"{here}/max_freq": max_hz,
        f"{here}/device/of_node/name": node,
        f"{here}/device/load": 842,
    }


def jetson(model: str, **parts: Mapping[str, object]) -> dict[str, object]:
    """Return the files of a Jetson."""
    files: dict[str, object] = {"/proc/device-tree/model": model + "\0", "/etc/nvpmodel.conf": CONF}
    for part in parts.values():
        files |= part
    return files


IIO = "/sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
ORIN_RAILS = {"VDD_IN": (5_160, 1_010), "VDD_CPU_GPU_CV": (5_144, 139), "VDD_SOC": (5_144, 348)}
TREES: dict[str, dict[str, object]] = {
    "orin-nano-jp6": jetson(
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        rails=ina(1, ORIN_RAILS),
        zones=zones({**ZONES_ORIN, "cv0-thermal": -256_000}),
        gpu=gpu("17000000.gpu", "gpu", 306_000_000, 1_020_000_000),
        fan={"/sys/class/hwmon/hwmon2/pwm1": 120, "/sys/class/hwmon/hwmon2/name": "pwmfan"},
    ),
    "orin-nano-jp7": jetson(
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        rails=ina(4, {"VDD_IN": (5_120, 676), "VDD_CPU_GPU_CV": (5_120, 86), "VDD_SOC": (5_120, 220)}),
        zones=zones(ZONES_ORIN),
        gpu=gpu("17000000.gpu", "gpu", 306_000_000, 918_000_000),
    ),
    "orin-nx": jetson(
        "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
        rails=ina(0, {"VDD_IN": (5_024, 6_020), "VDD_CPU_GPU_CV": (5_024, 3_900), "VDD_SOC": (5_024, 900)}),
        zones=zones({"cpu-thermal": 88_000, "tj-thermal": 89_000}),
        gpu=gpu("17000000.ga10b", "ga10b", 1_173_000_000, 1_173_000_000),
    ),
    "agx-orin": jetson(
        "Jetson AGX Orin Developer Kit",
        one=ina(1, {"VDD_GPU_SOC": (20_000, 117), "VDD_CPU_CV": (20_000, 20), "VIN_SYS_5V0": (5_000, 805)}),
        two=ina(2, {"NC": (0, 0), "VDDQ_VDD2_1V8AO": (5_000, 60), "NC#2": (0, 0)}),
        zones=zones({"Tboard-therm": 32_000, "tj-thermal": 44_343, "cv1-thermal": -256_000}),
        gpu=gpu("17000000.ga10b", "ga10b", 1_300_500_000, 1_300_500_000),
    ),
    "xavier-nx": jetson(
        "NVIDIA Jetson Xavier NX Developer Kit",
        rails=ina(3, {"VDD_IN": (5_000, 1_016), "VDD_CPU_GPU_CV": (5_000, 139), "VDD_SOC": (5_000, 221)}),
        zones=zones({"AUX-therm": 39_000, "CPU-therm": 39_500, "GPU-therm": 37_500, "PMIC-Die": 50_000,
                     "thermal-fan-est": 38_900}),
        gpu=gpu("17000000.gv11b", "gv11b", 510_000_000, 1_100_000_000),
    ),
    "nano": jetson(
        "NVIDIA Jetson Nano Developer Kit",
        rails={f"{IIO}/rail_name_0": "POM_5V_IN", f"{IIO}/in_voltage0_input": 5_120,
               f"{IIO}/in_current0_input": 500},
        zones=zones({"AO-therm": 39_500, "CPU-therm": 31_000, "GPU-therm": 30_500, "PLL-therm": 29_000,
                     "PMIC-Die": 100_000, "thermal-fan-est": 30_750}),
        gpu=gpu("57000000.gpu", "gpu", 76_800_000, 921_600_000),
    ),
    "tx2": jetson(
        "quill",
        rails=ina(0, {"VDD_IN": (19_000, 150)}),
        zones=zones({"BCPU-therm": 37_000, "MCPU-therm": 37_000, "GPU-therm": 35_500, "PLL-therm": 37_500,
                     "Tboard_tegra": 33_000, "Tdiode_tegra": 35_250, "PMIC-Die": 100_000,
                     "thermal-fan-est": 36_700}),
        gpu=gpu("17000000.gp10b", "gp10b", 114_750_000, 1_300_500_000),
    ),
    "intel": {
        "/proc/cpuinfo": "model name\t: 13th Gen Intel(R) Core(TM) i5-13500\n" * 2,
        "/sys/class/powercap/intel-rapl:0/name": "package-0",
        "/sys/class/powercap/intel-rapl:0/energy_uj": 65_997_277_274,
        "/sys/class/powercap/intel-rapl:0/max_energy_range_uj": 262_143_328_850,
        "/sys/class/powercap/intel-rapl:0/constraint_0_power_limit_uw": 65_000_000,
        "/sys/class/powercap/intel-rapl:0:0/name": "core",
        "/sys/class/powercap/intel-rapl:0:0/energy_uj": 1,
        "/sys/class/powercap/intel-rapl:1/name": "psys",
        "/sys/class/powercap/intel-rapl:1/energy_uj": 5,
        "/sys/class/hwmon/hwmon0/name": "acpitz",
        "/sys/class/hwmon/hwmon0/temp1_label": "Package id 9",
        "/sys/class/hwmon/hwmon0/temp1_input": 27_800,
        "/sys/class/hwmon/hwmon5/name": "coretemp",
        "/sys/class/hwmon/hwmon5/temp1_label": "Package id 0",
        "/sys/class/hwmon/hwmon5/temp1_input": 61_000,
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": 2_400_000,
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": 4_800_000,
        "/sys/devices/system/cpu/cpu1/online": 0,
        "/sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": 9_000_000,
        "/sys/devices/system/edac/mc/mc0/ce_count": 7,
        "/sys/devices/system/edac/mc/mc0/ue_count": 0,
        "/sys/devices/system/edac/mc/mc0/seconds_since_reset": 1_000,
        "/sys/fs/cgroup/penumbra/cpu.max": "max 100000",
    },
    "amd": {
        "/proc/cpuinfo": "model name\t: AMD EPYC 7543 32-Core Processor\n" * 4,
        "/sys/class/powercap/intel-rapl:0/name": "package-0",
        "/sys/class/powercap/intel-rapl:0/energy_uj": 65_532_000_000,
        "/sys/class/powercap/intel-rapl:0/max_energy_range_uj": 65_532_610_987,
        "/sys/class/powercap/intel-rapl:1/name": "package-1",
        "/sys/class/powercap/intel-rapl:1/energy_uj": 0,
        "/sys/class/powercap/intel-rapl:1/max_energy_range_uj": 65_532_610_987,
        "/sys/class/hwmon/hwmon2/name": "k10temp",
        "/sys/class/hwmon/hwmon2/temp1_label": "Tctl",
        "/sys/class/hwmon/hwmon2/temp1_input": 55_125,
        "/sys/class/hwmon/hwmon2/temp3_label": "Tccd1",
        "/sys/class/hwmon/hwmon2/temp3_input": 50_000,
    },
}  # fmt: skip
