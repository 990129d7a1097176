package l2

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
)

const (
	// UsernetPath follows the path of gvproxy's request, /connect, where a usernet agent asks for Usernet framing.
	UsernetPath = "/usernet"

	upgradeName   = "usernet/1"
	offloadHeader = "Usernet-Offload"
)

// ErrConnect says that the other end of a connection has answered in a way that is neither usernet's nor gvproxy's.
var ErrConnect = errors.New("not a gateway")

// Negotiate is the agent's part, on a new connection: it asks the gateway at path, usually /connect, for Usernet framing, and for
// HyperKit's where the gateway knows no other. takes is what the agent itself finishes. The caller sets the time that
// it may take. What it returns is for Stream, once the MTU is known.
func Negotiate(c io.ReadWriter, path string, takes Offload) (Options, error) {
	if _, err := fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: gateway\r\nConnection: Upgrade\r\nUpgrade: %s\r\n%s: %s\r\nContent-Length: 0\r\n\r\n",
		path+UsernetPath, upgradeName, offloadHeader, takes); err != nil {
		return Options{}, fmt.Errorf("ask gateway for frames: %w", err)
	}
	r := bufio.NewReader(&io.LimitedReader{R: c, N: maxAnswer})
	resp, err := http.ReadResponse(r, &http.Request{Method: http.MethodPost})
	if err != nil {
		return Options{}, fmt.Errorf("read gateway's answer: %w", err)
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		if !strings.EqualFold(resp.Header.Get("Upgrade"), upgradeName) {
			return Options{}, fmt.Errorf("gateway changes to %q: %w", resp.Header.Get("Upgrade"), ErrConnect)
		}
		return Options{Framing: Usernet, Takes: parseOffload(resp.Header.Get(offloadHeader)), Early: rest(r)}, nil
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return Options{}, fmt.Errorf("read gateway's answer: %w", err)
	}
	if resp.StatusCode != http.StatusNotFound || resp.Close {
		return Options{}, fmt.Errorf("gateway answers %s: %w", resp.Status, ErrConnect)
	}
	if err := ConnectPlain(c, path); err != nil {
		return Options{}, err
	}
	return Options{Framing: HyperKit, Early: rest(r)}, nil
}

// maxAnswer is how much of an answer, and of the frames behind it, is read before it is understood.
const maxAnswer = 64 << 10

// ConnectPlain asks for HyperKit framing, as gvforwarder does. There is no answer.
func ConnectPlain(w io.Writer, path string) error {
	if _, err := fmt.Fprintf(w, "POST %s HTTP/1.1\r\nHost: gateway\r\nContent-Length: 0\r\n\r\n", path); err != nil {
		return fmt.Errorf("ask gateway for frames: %w", err)
	}
	return nil
}

// rest is what r has read and nobody has asked for.
func rest(r *bufio.Reader) []byte {
	b, _ := r.Peek(r.Buffered())
	return bytes.Clone(b)
}

// Connect is the gateway's part: it takes the connection of a request for /connect, with UsernetPath behind it or not, from the
// HTTP server, and agrees on a framing. takes is what the gateway itself finishes. An error has been answered as far as it can
// be. What it returns is for Stream; the connection is the caller's.
func Connect(w http.ResponseWriter, r *http.Request, takes Offload) (net.Conn, Options, error) {
	asked := strings.HasSuffix(r.URL.Path, UsernetPath)
	if asked && !strings.EqualFold(r.Header.Get("Upgrade"), upgradeName) {
		w.Header().Set("Upgrade", upgradeName)
		http.Error(w, "want Upgrade: "+upgradeName, http.StatusUpgradeRequired)
		return nil, Options{}, fmt.Errorf("upgrade to %q: %w", r.Header.Get("Upgrade"), errors.ErrUnsupported)
	}
	c, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return nil, Options{}, fmt.Errorf("take connection from HTTP: %w", err)
	}
	// What the machine has sent behind the request is frames already.
	opts := Options{Framing: HyperKit, Early: rest(buf.Reader)}
	if !asked {
		return c, opts, nil
	}
	opts.Framing, opts.Takes = Usernet, parseOffload(r.Header.Get(offloadHeader))
	if _, err := fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n%s: %s\r\n\r\n",
		upgradeName, offloadHeader, takes); err != nil {
		c.Close()
		return nil, Options{}, fmt.Errorf("answer machine: %w", err)
	}
	return c, opts, nil
}
