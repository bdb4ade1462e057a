"""Measures an instance under real load: experiments, the load generator, statistics, reports, comparisons."""
