"""Adapters that let evaluation harnesses use flexbatch; each harness is imported by its own module only."""
