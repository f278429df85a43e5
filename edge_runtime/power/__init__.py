"""Power, energy and temperature of this machine, from what it measures itself.

```
found = find(gpu=0)     # one reader of a whole Jetson, or those of the GPU and the processor
with opened(found.sources), EnergyWindow(found.sources) as window:
    run_frames()
for energy in window.results:
    print(energy.source, energy.joules, energy.problem)
```

`find.find` chooses readers and says why the others can't be used, `window.EnergyWindow` measures
energy while something runs, `thermal.temperatures` reads the thermal zones. Readers are in `jtop`
and `ina3221` (Jetson), `nvml` (NVIDIA GPU) and `rapl` (x86 processor). What can't be measured has
a reason in words, and is never zero.
"""
