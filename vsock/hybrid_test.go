package vsock

import (
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func TestReadReply(t *testing.T) {
	for _, tt := range []struct{ stream, rest string }{
		{"OK 1073741824\n", ""},
		{"OK 0\n\n", "\n"},
		{"OK 4294967295\nOK 5\n", "OK 5\n"},
	} {
		r := strings.NewReader(tt.stream)
		if err := readReply(r); err != nil {
			t.Errorf("%q: %v", tt.stream, err)
		}
		if rest, _ := io.ReadAll(r); string(rest) != tt.rest {
			t.Errorf("%q: %q is left, want %q", tt.stream, rest, tt.rest)
		}
	}
}

func TestReadReplyErrors(t *testing.T) {
	for _, tt := range []struct{ stream, want string }{
		{"", "EOF"},
		{"OK 10", `ends after "OK 10"`},
		{"\n", `replies ""`},
		{"OK\n", `replies "OK"`},
		{"OK \n", `replies "OK "`},
		{"OK x\n", `replies "OK x"`},
		{"OK 4294967296\n", "replies"},
		{"OK -1\n", "replies"},
		{"OK 5\r\n", `replies "OK 5\r"`},
		{"NO 5\n", `replies "NO 5"`},
		{"OK " + strings.Repeat("1", 1000), "has no end"},
		{strings.Repeat("\x00", 1000) + "\n", "has no end"},
	} {
		r := strings.NewReader(tt.stream)
		err := readReply(r)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%.40q: error %v, want one with %q", tt.stream, err, tt.want)
		}
		if read := len(tt.stream) - r.Len(); read > maxReply {
			t.Errorf("%.40q: %d bytes were read", tt.stream, read)
		}
	}
	broken := errors.New("broken")
	if err := readReply(iotest.ErrReader(broken)); err != broken {
		t.Errorf("error %v, want %v", err, broken)
	}
}

func FuzzReadReply(f *testing.F) {
	f.Add([]byte("OK 1073741824\nhello"))
	f.Add([]byte("OK 1"))
	f.Fuzz(func(t *testing.T, stream []byte) {
		r := strings.NewReader(string(stream))
		err := readReply(r)
		read := stream[:len(stream)-r.Len()]
		if len(read) > maxReply {
			t.Fatalf("%d bytes were read", len(read))
		}
		if err == nil && (!strings.HasPrefix(string(read), "OK ") || strings.IndexByte(string(read), '\n') != len(read)-1) {
			t.Fatalf("%q was taken for a reply", read)
		}
	})
}
