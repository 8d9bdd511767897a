"""Run folders: names, configs, the ledger of sweeps, provenance, progress bars and redaction of secrets."""
