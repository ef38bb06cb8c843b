"""Private interfaces of libraries, each looked up when it is used: only these files name them. Imports nothing."""
