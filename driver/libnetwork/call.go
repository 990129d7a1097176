package libnetwork

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"path"
	"time"
)

// maxBody bounds a request. Ten thousand published ports, which people do ask for (-p 10000-20000:10000-20000/udp), are a
// megabyte.
const maxBody = 16 << 20

// bodyTimeout is how long a request may take to arrive.
const bodyTimeout = 30 * time.Second

// refusal is an answer with a status of its own, for what is not a request of the protocol.
type refusal struct {
	status int
	text   string
}

func (r refusal) Error() string { return r.text }

// call makes a handler of a method: it decodes the request, calls f, and encodes what f returns.
func call[Req, Res any](log *slog.Logger, f func(context.Context, Req) (Res, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		var res Res
		req, err := decode[Req](w, r)
		if err == nil {
			res, err = f(r.Context(), req)
		}
		// Docker swallows the errors of teardown calls: this line is the only trace of them.
		log := log.With("method", path.Base(r.URL.Path), "took", time.Since(start))
		if err != nil {
			log.Warn("request refused", "err", err)
			answerError(w, err)
			return
		}
		log.Debug("request served")
		answer(w, http.StatusOK, res)
	})
}

// constant makes a handler of a method whose request is empty and whose answer is always the same.
func constant(res any) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { answer(w, http.StatusOK, res) })
}

// refuse makes a handler of what is not served.
func refuse(status int) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answerError(w, refusal{status, fmt.Sprintf("%s %.64q: %s", r.Method, r.URL.Path, http.StatusText(status))})
	})
}

// decode reads the one JSON value that a body is. Docker sends a request again after a broken connection, but with
// its body used up: an empty one must not be taken for a request (moby pkg/plugins, callWithRetry).
func decode[Req any](w http.ResponseWriter, r *http.Request) (req Req, err error) {
	// Only the body has a deadline. One for the whole request would, when it passes, cancel a slow method. A recorder
	// in a test has no deadlines.
	conn := http.NewResponseController(w)
	_ = conn.SetReadDeadline(time.Now().Add(bodyTimeout))
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	_ = conn.SetReadDeadline(time.Time{})

	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return req, refusal{http.StatusRequestEntityTooLarge, fmt.Sprintf("request is larger than %d bytes", maxBody)}
	case err != nil:
		return req, refusal{http.StatusBadRequest, fmt.Sprintf("read request: %v", err)}
	case len(body) == 0:
		return req, refusal{http.StatusBadRequest, "request is empty: its connection broke and the engine sent it again without the body"}
	}
	if err := json.Unmarshal(body, &req); err != nil {
		return req, refusal{http.StatusBadRequest, fmt.Sprintf("malformed request: %v", err)}
	}
	return req, nil
}

// answerError maps an error to the protocol. What a method returns is a 200 with Err, which the user sees as
// "remote: …"; any other status would put the method's name before it. 404 in particular would be taken for success by
// two methods.
func answerError(w http.ResponseWriter, err error) {
	status := http.StatusOK
	var r refusal
	if errors.As(err, &r) {
		status = r.status
	}
	answer(w, status, ErrorResponse{Err: err.Error()})
}

func answer(w http.ResponseWriter, status int, res any) {
	text, err := json.Marshal(res)
	if err != nil {
		status, text = http.StatusInternalServerError, []byte(`{"Err":"encode answer"}`)
	}
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(status)
	w.Write(append(text, '\n')) // an error is the client's: it has gone
}
