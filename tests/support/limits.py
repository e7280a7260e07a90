"""How long tests wait for what must come: only what hangs takes so long, however busy the machine is."""

HANG_S = 1800
