"""Carries plans out: executes Steps, runs sweeps, and is the engine that the surface talks to."""
