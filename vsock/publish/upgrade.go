package publish

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// errRefused is an answer of the host that is not 101.
type errRefused struct {
	status int
	reason string
}

func (e *errRefused) Error() string {
	if e.status == http.StatusNotFound {
		return "the gateway there is none that publishes ports for usernet"
	}
	return e.reason
}

// upgrade sends a request for path and reads the answer: not a byte more, what follows is the caller's. It closes conn if
// there is an error.
func upgrade(ctx context.Context, conn net.Conn, path, header, value string) (_ http.Header, err error) {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() {
			err = ctx.Err()
		}
		if errors.Is(err, context.DeadlineExceeded) {
			err = errors.New("it does not answer")
		}
		if err != nil {
			conn.Close()
		}
	}()
	req := "POST " + path + " HTTP/1.1\r\nHost: usernet\r\nConnection: Upgrade\r\nUpgrade: " + Protocol + "\r\n" + header + ": " + value + "\r\nContent-Length: 0\r\n\r\n"
	if _, err := io.WriteString(conn, req); err != nil {
		return nil, err
	}
	head, err := readHead(conn)
	if err != nil {
		return nil, err
	}
	return parseAnswer(head, conn)
}

// shortest is the least that an answer 101 can be: the first read may wait for as many bytes.
const shortest = len("HTTP/1.1 101 \r\nConnection:Upgrade\r\nUpgrade:" + Protocol + "\r\n\r\n")

// readHead reads the head of an answer, up to the empty line and not a byte more, without asking for each byte by itself.
func readHead(r io.Reader) ([]byte, error) {
	const end = "\r\n\r\n"
	head := make([]byte, shortest, 512)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, fmt.Errorf("answer: %w", err)
	}
	for {
		// So many bytes of the end may have come.
		have := len(end)
		for !bytes.HasSuffix(head, []byte(end[:have])) {
			have--
		}
		n := len(head)
		switch {
		case have == len(end):
			return head, nil
		case n > maxHead:
			return nil, fmt.Errorf("answer: its head is longer than %d bytes", maxHead)
		}
		head = append(head, end[have:]...)
		if _, err := io.ReadFull(r, head[n:]); err != nil {
			return nil, fmt.Errorf("answer: %w", err)
		}
	}
}

// parseAnswer returns the fields of an answer 101. Of another one it reads the reason from r.
func parseAnswer(head []byte, r io.Reader) (http.Header, error) {
	res, err := http.ReadResponse(bufio.NewReader(io.MultiReader(bytes.NewReader(head), io.LimitReader(r, 1024))), nil)
	if err != nil {
		return nil, fmt.Errorf("answer: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusSwitchingProtocols {
		reason := make([]byte, 512)
		n, _ := io.ReadFull(res.Body, reason)
		text := strings.TrimSpace(string(bytes.ToValidUTF8(reason[:n], []byte("?"))))
		if text == "" || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' }) {
			text = res.Status
		}
		return nil, &errRefused{res.StatusCode, text}
	}
	if !isUpgrade(res.Header) {
		return nil, errors.New("answer: 101 to something else than " + Protocol)
	}
	return res.Header, nil
}

// isUpgrade tells whether a request asks for our protocol, or an answer grants it.
func isUpgrade(h http.Header) bool {
	upgrade := false
	for _, field := range h.Values("Connection") {
		for token := range strings.SplitSeq(field, ",") {
			upgrade = upgrade || strings.EqualFold(strings.TrimSpace(token), "upgrade")
		}
	}
	return upgrade && h.Get("Upgrade") == Protocol
}
