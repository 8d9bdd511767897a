"""Hydra launcher plugin `hydra/launcher=subprocess`: each job of a multirun is a process, recorded in a ledger."""
