//go:build !linux

package main

import (
	"context"
	"fmt"
)

// The host's side of virtual machines. The rest is made of Linux's network namespaces.
var commands = []command{
	{"gateway", "[ports]", "be the network of virtual machines, on their host", (*program).gateway},
	{"version", "", "print the version", (*program).version},
}

// callers are asked in turn, before the first argument is taken for a command.
var callers = []caller{
	as(gvproxyName, (*program).gvproxy),
	as("gvforwarder", func(p *program, _ context.Context, _ []string) int {
		fmt.Fprintln(p.stderr, "gvforwarder: it belongs into a Linux guest; hosts run usernet gateway")
		return 1
	}),
}

func helper([]string) bool { return false }
