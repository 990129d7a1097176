package forward

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/crypto/ssh"
)

// maxKeyFile bounds what is read of a key file, in bytes.
const maxKeyFile = 1 << 20

// readKey reads a private key. The passphrase is looked at only if the key has one.
func readKey(file, passphrase string) (ssh.Signer, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxKeyFile {
		return nil, fmt.Errorf("%s is not a key file", file)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	signer, err := parseKey(text, passphrase)
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", file, err)
	}
	return signer, nil
}

func parseKey(text []byte, passphrase string) (ssh.Signer, error) {
	signer, err := ssh.ParsePrivateKey(text)
	if _, missing := errors.AsType[*ssh.PassphraseMissingError](err); missing && passphrase != "" {
		return ssh.ParsePrivateKeyWithPassphrase(text, []byte(passphrase))
	}
	return signer, err
}

// server is an SSH server in a machine, as one goroutine uses it.
type server struct {
	network Network
	addr    netip.AddrPort
	user    string
	signer  ssh.Signer
	key     ssh.PublicKey // the server's, as it was seen first; nil: not yet
}

// connect logs in.
func (v *server) connect(ctx context.Context, limit time.Duration) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	conn, err := v.network.DialTCP(ctx, netip.AddrPort{}, v.addr)
	if err != nil {
		return nil, err
	}
	s := &session{done: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	key := v.key
	config := &ssh.ClientConfig{
		User: v.user,
		Auth: []ssh.AuthMethod{ssh.PublicKeys(v.signer)},
		// It is called again whenever keys are exchanged anew.
		HostKeyCallback: func(_ string, _ net.Addr, shown ssh.PublicKey) error {
			if key == nil {
				key = shown
			}
			return sameKey(key, shown)
		},
	}
	if v.key != nil {
		config.HostKeyAlgorithms = algorithms(v.key.Type())
	}
	c, channels, requests, err := ssh.NewClientConn(&watched{conn, s.end}, v.addr.String(), config)
	if err != nil {
		stop()
		return nil, errors.Join(err, context.Cause(ctx))
	}
	s.client = ssh.NewClient(c, channels, requests)
	if !stop() {
		s.client.Close()
		s.client.Wait()
		return nil, context.Cause(ctx)
	}
	// Only now: a machine that boots for the first time may start with one key and make another.
	v.key = key
	return s, nil
}

// errOtherKey says that this is not the server that was there before.
var errOtherKey = errors.New("the server's key has changed")

// sameKey checks the key that the server shows.
func sameKey(want, shown ssh.PublicKey) error {
	if bytes.Equal(want.Marshal(), shown.Marshal()) {
		return nil
	}
	return fmt.Errorf("%w from %s to %s", errOtherKey, ssh.FingerprintSHA256(want), ssh.FingerprintSHA256(shown))
}

// algorithms are how a key of the type signs, best first. To ask for others would have a server that has several keys show
// another one.
func algorithms(keyType string) []string {
	if keyType == ssh.KeyAlgoRSA {
		return []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}
	}
	return []string{keyType}
}
