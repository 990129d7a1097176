package forward

import (
	"fmt"
	"net"

	"github.com/Microsoft/go-winio"
	"golang.org/x/sys/windows"
)

// listenPipe makes the pipe at path, for this process's user only.
func listenPipe(path string) (net.Listener, error) {
	user, err := windows.GetCurrentProcessToken().GetTokenUser()
	if err != nil {
		return nil, fmt.Errorf("listen npipe %s: who is the user: %w", path, err)
	}
	l, err := winio.ListenPipe(path, &winio.PipeConfig{
		// Protected from what is inherited; all rights for the user, none for others.
		SecurityDescriptor: "D:P(A;;GA;;;" + user.User.Sid.String() + ")",
		// A pipe of bytes has no way to end one direction only.
		MessageMode:      true,
		InputBufferSize:  64 << 10,
		OutputBufferSize: 64 << 10,
	})
	if err != nil {
		return nil, fmt.Errorf("listen npipe %s: %w", path, err)
	}
	return l, nil
}
