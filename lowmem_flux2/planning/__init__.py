"""What to run, where, and what it costs. Never imports torch: ``lowmem-flux2 plan`` answers in half a second."""
