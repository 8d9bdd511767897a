"""The commands, one file each: compose, check, call the library, print. The library does not import this package."""
