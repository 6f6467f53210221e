"""What tests, benchmarks and the scripts of tests/fixtures share; no command needs it."""
