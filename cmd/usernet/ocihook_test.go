//go:build linux

package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestOCIHookCommandLine(t *testing.T) {
	const state = `{"id": "x", "status": "creating", "pid": 1, "bundle": "/nowhere"}`
	for _, tt := range []struct {
		name, args, stdin string
		code              int
		want              string // in standard error
	}{
		{"usernet", "oci-hook", "", 1, "usernet oci-hook: invalid container's state: there is none on standard input"},
		{"usernet", "oci-hook now", state, 2, `unexpected argument "now"`},
		{"usernet", "oci-hook -o mood=good", state, 2, "want NAME=VALUE; the names are"},
		{"usernet", "oci-hook --colour", state, 2, "flag provided but not defined: -colour"},
		{"usernet", "oci-hook -p 80 --publish 81 -o mtu=9000 -resolv-conf off -default-route false", state, 1, "/nowhere/config.json"},
		{"usernet", "oci-hook --control-socket /nowhere/s", `{"id": "x", "status": "stopped", "bundle": "/nowhere"}`, 1, "/nowhere/s"},
		{"netns", "", "{}", 1, "netns: invalid container's state: it has no id"},
		{"netns", "serve", "", 2, `there is no command "serve"`},
		{"netns", "-mtu many", "", 2, "invalid value"},
		{"netns", "-h", "", 0, "usage: netns"},
		{"netns", "create -bridge=", "", 1, "name cannot be empty"},
	} {
		t.Run(tt.name+" "+tt.args, func(t *testing.T) {
			var out, errs bytes.Buffer
			p := &program{name: tt.name, stdin: strings.NewReader(tt.stdin), stdout: &out, stderr: &errs}
			code := p.main(t.Context(), strings.Fields(tt.args))
			if code != tt.code || !strings.Contains(errs.String(), tt.want) || out.Len() > 0 {
				t.Errorf("exit status %d, stdout %q, stderr %q; want %d and %q", code, out.String(), errs.String(), tt.code, tt.want)
			}
		})
	}
}
