"""Tampering with bundles of every format: what a broken transfer, a careless hand or an attacker does to one.

A tampering changes a copy of a bundle in place, at random; `harmless` says why one need not be found. An attacker has
a key of his own and all of the tool; what he does not have is the owner's key.
"""
