"""The test files of the installed peft release, run with the adapter types of moe_peft."""
