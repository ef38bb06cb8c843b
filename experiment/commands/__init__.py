"""The command line of both experiments. Imports everything but comparisons."""
