"""Devices and hosts: the sharding table, several processes as one, and how they find each other."""
