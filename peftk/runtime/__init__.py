"""What stands between operators and backends: who runs a call, what the user asked for, and what was measured."""
