"""`ci/soak`: checks over and over, in one parent: no verdict may change, and nothing may grow."""
