//go:build !unix

package l2

import (
	"os"
	"syscall"
)

func nonblocking(any) syscall.RawConn { return nil }

func writeNow(uintptr, []byte) (int, error) { return 0, nil }

// Stdio makes a link of standard input and output. Here nothing but the process's end interrupts them.
func Stdio(in, out *os.File, opts Options) (*Link, error) { return Files(in, out, opts), nil }
