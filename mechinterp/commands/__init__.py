"""What the subcommands do: load, run, print. One file each; their grammar is in mechinterp/cli."""
