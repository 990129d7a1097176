package libnetwork

import (
	"bytes"
	"io"
	"net"
	"net/http/httptest"
	"strings"
	"testing"
)

// A body that ends early, as that of a killed dockerd does, has no effect.
func TestTornBody(t *testing.T) {
	d := newFake()
	srv := httptest.NewServer(Handler(d, nil, quiet()))
	defer srv.Close()
	c, err := net.Dial("tcp", srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	body := `{"NetworkID":"n"}`
	io.WriteString(c, "POST /NetworkDriver.CreateNetwork HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"+body)
	c.(*net.TCPConn).CloseWrite()
	answer, err := io.ReadAll(c)
	c.Close()
	if err != nil || !bytes.HasPrefix(answer, []byte("HTTP/1.1 400 ")) || !strings.Contains(string(answer), `{"Err":"read request: unexpected EOF"}`) {
		t.Errorf("answer %q, %v", answer, err)
	}
	if n, _ := d.state(); len(n) != 0 {
		t.Errorf("networks %v", n)
	}
}
