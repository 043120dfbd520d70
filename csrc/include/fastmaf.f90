! fastmaf for Fortran 2008: fastmaf.h with natural arrays. x is (features, samples), contexts (context_features, samples), column-major as
! Fortran has them: nothing is transposed or copied. real32 and real64 may be mixed with flows of either dtype.
!
!     use fastmaf
!     type(flow_model) :: model
!     type(flow_evaluator) :: flow
!     call model%open("flow.safetensors")
!     call flow%create(model)                       ! one per calling thread; threads=4 to share the rows of a call
!     call flow%log_prob(x, log_p)                  ! x(D, n), log_p(n)
!     call flow%log_prob(x, log_p, context)         ! context(C) for all, or context(C, n)
!     call flow%sample(samples, seed=1_int64)       ! samples(D, n)
!
! Every procedure takes `stat` and `errmsg`, as Fortran's own statements do: without stat an error stops the program with its text.
! Link with -lfastmaf.
module fastmaf
    use, intrinsic :: iso_c_binding
    use, intrinsic :: iso_fortran_env, only: int32, int64, real32, real64
    implicit none
    private

    integer, parameter, public :: fastmaf_ok = 0, fastmaf_invalid_argument = 1, fastmaf_cannot_read = 2, &
            fastmaf_invalid_file = 3, &
        fastmaf_unsupported = 4, fastmaf_out_of_memory = 5, fastmaf_internal = 6

    ! A flow: immutable, shared by threads.
    type, public :: flow_model
        private
        type(c_ptr) :: handle = c_null_ptr
    contains
        procedure :: open => open_model
        procedure :: close => close_model
        procedure :: features => features_of
        procedure :: context_features => context_features_of
        final :: free_model
    end type

    ! What one calling thread needs to evaluate a model.
    type, public :: flow_evaluator
        private
        type(c_ptr) :: handle = c_null_ptr
        integer(int64) :: features = 0, context_features = 0
    contains
        procedure :: create => create_evaluator
        procedure :: close => close_evaluator
        ! log_prob(x, log_prob [, context]): nats
        generic :: log_prob => log_prob_real32, log_prob_real32_shared, log_prob_real32_each, &
            log_prob_real64, log_prob_real64_shared, log_prob_real64_each
        ! log_prob_and_grad(x, log_prob, d_x [, context, d_context]): d_context (C) is the sum over samples of a context (C)
        generic :: log_prob_and_grad => log_prob_and_grad_real32, log_prob_and_grad_real32_shared, &
            log_prob_and_grad_real32_each, &
            log_prob_and_grad_real64, log_prob_and_grad_real64_shared, log_prob_and_grad_real64_each
        ! to_noise(x, noise [, context])
        generic :: to_noise => to_noise_real32, to_noise_real32_shared, to_noise_real32_each, &
            to_noise_real64, to_noise_real64_shared, to_noise_real64_each
        ! from_noise(noise, x [, context])
        generic :: from_noise => from_noise_real32, from_noise_real32_shared, from_noise_real32_each, &
            from_noise_real64, from_noise_real64_shared, from_noise_real64_each
        ! sample(samples [, context], seed [, offset, context_offset, log_prob]): sample j of context i is a function of seed, offset + j, context_offset + i
        generic :: sample => sample_real32, sample_real32_shared, sample_real32_each, &
            sample_real64, sample_real64_shared, sample_real64_each
        procedure, private :: log_prob_real32, log_prob_real32_shared, log_prob_real32_each, log_prob_real64
        procedure, private :: log_prob_real64_shared, log_prob_real64_each
        procedure, private :: log_prob_and_grad_real32, log_prob_and_grad_real32_shared, log_prob_and_grad_real32_each, &
            log_prob_and_grad_real64
        procedure, private :: log_prob_and_grad_real64_shared, log_prob_and_grad_real64_each
        procedure, private :: to_noise_real32, to_noise_real32_shared, to_noise_real32_each, to_noise_real64
        procedure, private :: to_noise_real64_shared, to_noise_real64_each
        procedure, private :: from_noise_real32, from_noise_real32_shared, from_noise_real32_each, from_noise_real64
        procedure, private :: from_noise_real64_shared, from_noise_real64_each
        procedure, private :: sample_real32, sample_real32_shared, sample_real32_each, sample_real64
        procedure, private :: sample_real64_shared, sample_real64_each
        final :: free_evaluator
    end type

    type, bind(c) :: c_array
        type(c_ptr) :: data
        integer(c_int32_t) :: dtype
        integer(c_int64_t) :: group_stride, row_stride, column_stride
    end type

    type, bind(c) :: c_output
        type(c_ptr) :: data
        integer(c_int32_t) :: dtype
        integer(c_int64_t) :: row_stride, column_stride
    end type

    interface
        integer(c_int) function c_open(path, model, message, size) bind(c, name="fastmaf_model_open")
            import :: c_int, c_ptr, c_char, c_size_t
            character(kind=c_char), intent(in) :: path(*)
            type(c_ptr), intent(out) :: model
            character(kind=c_char), intent(out) :: message(*)
            integer(c_size_t), value :: size
        end function
        subroutine c_free_model(model) bind(c, name="fastmaf_model_free")
            import :: c_ptr
            type(c_ptr), value :: model
        end subroutine
        integer(c_int64_t) function c_features(model) bind(c, name="fastmaf_model_features")
            import :: c_int64_t, c_ptr
            type(c_ptr), value :: model
        end function
        integer(c_int64_t) function c_context_features(model) bind(c, name="fastmaf_model_context_features")
            import :: c_int64_t, c_ptr
            type(c_ptr), value :: model
        end function
        integer(c_int) function c_create(model, threads, evaluator, message, size) bind(c, name="fastmaf_evaluator_create")
            import :: c_int, c_int32_t, c_ptr, c_char, c_size_t
            type(c_ptr), value :: model
            integer(c_int32_t), value :: threads
            type(c_ptr), intent(out) :: evaluator
            character(kind=c_char), intent(out) :: message(*)
            integer(c_size_t), value :: size
        end function
        subroutine c_free_evaluator(evaluator) bind(c, name="fastmaf_evaluator_free")
            import :: c_ptr
            type(c_ptr), value :: evaluator
        end subroutine
        type(c_ptr) function c_message(evaluator) bind(c, name="fastmaf_message")
            import :: c_ptr
            type(c_ptr), value :: evaluator
        end function
        integer(c_int) function c_log_prob(evaluator, groups, rows, x, context, log_prob) bind(c, name="fastmaf_log_prob")
            import :: c_int, c_int64_t, c_ptr, c_array, c_output
            type(c_ptr), value :: evaluator, context
            integer(c_int64_t), value :: groups, rows
            type(c_array), intent(in) :: x
            type(c_output), intent(in) :: log_prob
        end function
        integer(c_int) function c_log_prob_and_grad(evaluator, groups, rows, x, context, log_prob, d_x, d_context) &
            bind(c, name="fastmaf_log_prob_and_grad")
            import :: c_int, c_int64_t, c_ptr, c_array, c_output
            type(c_ptr), value :: evaluator, context, d_context
            integer(c_int64_t), value :: groups, rows
            type(c_array), intent(in) :: x
            type(c_output), intent(in) :: log_prob, d_x
        end function
        integer(c_int) function c_sample(evaluator, groups, rows, context, seed, offset, context_offset, samples, log_prob) &
            bind(c, name="fastmaf_sample")
            import :: c_int, c_int32_t, c_int64_t, c_ptr, c_output
            type(c_ptr), value :: evaluator, context, log_prob
            integer(c_int64_t), value :: groups, rows, seed, offset
            integer(c_int32_t), value :: context_offset
            type(c_output), intent(in) :: samples
        end function
        integer(c_int) function c_to_noise(evaluator, groups, rows, x, context, noise) bind(c, name="fastmaf_to_noise")
            import :: c_int, c_int64_t, c_ptr, c_array, c_output
            type(c_ptr), value :: evaluator, context
            integer(c_int64_t), value :: groups, rows
            type(c_array), intent(in) :: x
            type(c_output), intent(in) :: noise
        end function
        integer(c_int) function c_from_noise(evaluator, groups, rows, noise, context, x) bind(c, name="fastmaf_from_noise")
            import :: c_int, c_int64_t, c_ptr, c_array, c_output
            type(c_ptr), value :: evaluator, context
            integer(c_int64_t), value :: groups, rows
            type(c_array), intent(in) :: noise
            type(c_output), intent(in) :: x
        end function
        integer(c_size_t) function c_strlen(text) bind(c, name="strlen")
            import :: c_size_t, c_ptr
            type(c_ptr), value :: text
        end function
    end interface

contains

    ! Reads a flow from a file that `flow.save` wrote in Python.
    subroutine open_model(self, path, stat, errmsg)
        class(flow_model), intent(inout) :: self
        character(len=*), intent(in) :: path
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        character(kind=c_char) :: message(512)
        integer(c_int) :: status
        call self%close()
        status = c_open(path // c_null_char, self%handle, message, size(message, kind=c_size_t))
        call report(int(status), text_of(message), stat, errmsg)
    end subroutine

    ! Frees the model; evaluators of it go on.
    subroutine close_model(self)
        class(flow_model), intent(inout) :: self
        call c_free_model(self%handle)
        self%handle = c_null_ptr
    end subroutine

    subroutine free_model(self)
        type(flow_model), intent(inout) :: self
        call self%close()
    end subroutine

    integer(int64) function features_of(self)
        class(flow_model), intent(in) :: self
        features_of = c_features(self%handle)
    end function

    integer(int64) function context_features_of(self)
        class(flow_model), intent(in) :: self
        context_features_of = c_context_features(self%handle)
    end function

    ! For one calling thread; at most `threads` compute together, 1 if it is absent.
    subroutine create_evaluator(self, model, threads, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        class(flow_model), intent(in) :: model
        integer, intent(in), optional :: threads
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        character(kind=c_char) :: message(512)
        integer(c_int) :: status
        integer(c_int32_t) :: count
        call self%close()
        count = 1
        if (present(threads)) count = int(threads, c_int32_t)
        status = c_create(model%handle, count, self%handle, message, size(message, kind=c_size_t))
        self%features = max(model%features(), 0_int64)
        self%context_features = max(model%context_features(), 0_int64)
        call report(int(status), text_of(message), stat, errmsg)
    end subroutine

    subroutine close_evaluator(self)
        class(flow_evaluator), intent(inout) :: self
        call c_free_evaluator(self%handle)
        self%handle = c_null_ptr
    end subroutine

    subroutine free_evaluator(self)
        type(flow_evaluator), intent(inout) :: self
        call self%close()
    end subroutine

    ! The end of every call: its status and text to the caller, or the end of the program.
    subroutine report(status, text, stat, errmsg)
        integer, intent(in) :: status
        character(len=*), intent(in) :: text
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        if (present(stat)) stat = status
        if (status == fastmaf_ok) return
        if (present(errmsg)) errmsg = text
        if (.not. present(stat)) then
            write (*, "(2a)") "fastmaf: ", text
            error stop 1
        end if
    end subroutine

    subroutine finish(self, status, stat, errmsg)
        class(flow_evaluator), intent(in) :: self
        integer(c_int), intent(in) :: status
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        character(kind=c_char), pointer :: message(:)
        type(c_ptr) :: text
        if (status == fastmaf_ok) then
            if (present(stat)) stat = fastmaf_ok
            return
        end if
        text = c_message(self%handle)
        call c_f_pointer(text, message, [c_strlen(text)])
        call report(int(status), text_of(message), stat, errmsg)
    end subroutine

    function text_of(message) result(text)
        character(kind=c_char), intent(in) :: message(:)
        character(len=:), allocatable :: text
        integer :: i
        text = ""
        do i = 1, size(message)
            if (message(i) == c_null_char) exit
            text = text // message(i)
        end do
    end function

    ! Whether the shapes of a call fit; if not, that is its error.
    logical function fits(condition, what, stat, errmsg)
        logical, intent(in) :: condition
        character(len=*), intent(in) :: what
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        fits = condition
        if (.not. fits) call report(fastmaf_invalid_argument, what, stat, errmsg)
    end function

    type(c_array) function rows_at(data, dtype, columns, step)
        type(c_ptr), intent(in) :: data
        integer, intent(in) :: dtype
        integer(int64), intent(in) :: columns, step
        rows_at = c_array(data, int(dtype, c_int32_t), 0_c_int64_t, int(step, c_int64_t), 1_c_int64_t)
        if (columns == 0) rows_at%column_stride = 0
    end function

    type(c_output) function into(data, dtype, columns)
        type(c_ptr), intent(in) :: data
        integer, intent(in) :: dtype
        integer(int64), intent(in) :: columns
        into = c_output(data, int(dtype, c_int32_t), int(columns, c_int64_t), 1_c_int64_t)
    end function

    subroutine log_prob_real32(self, x, log_prob, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), contiguous, target :: x(:, :)
        real(real32), intent(out), contiguous, target :: log_prob(:)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        if (.not. fits(size(x, 1, int64) == self%features .and. size(log_prob) == size(x, 2) .and. self%context_features == 0, &
            "log_prob: x must be (features, samples), log_prob (samples); the flow takes a context", stat, errmsg)) return
        call finish(self, c_log_prob(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), rows_at(c_loc(x), 0, self%features, &
            self%features), &
            c_null_ptr, into(c_loc(log_prob), 0, 1_int64)), stat, errmsg)
    end subroutine

    subroutine log_prob_and_grad_real32(self, x, log_prob, d_x, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), contiguous, target :: x(:, :)
        real(real32), intent(out), contiguous, target :: log_prob(:), d_x(:, :)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        if (.not. fits(size(x, 1, int64) == self%features .and. size(log_prob) == size(x, 2) .and. all(shape(d_x) == shape(x)) &
            .and. self%context_features == 0, &
            "x and d_x must be (features, samples), log_prob (samples); the flow takes a context", &
            stat, errmsg)) return
        call finish(self, c_log_prob_and_grad(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), &
            rows_at(c_loc(x), 0, self%features, self%features), c_null_ptr, into(c_loc(log_prob), 0, 1_int64), &
            into(c_loc(d_x), 0, self%features), c_null_ptr), stat, errmsg)
    end subroutine

    subroutine to_noise_real32(self, x, noise, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), contiguous, target :: x(:, :)
        real(real32), intent(out), contiguous, target :: noise(:, :)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        if (.not. fits(size(x, 1, int64) == self%features .and. all(shape(noise) == shape(x)) .and. self%context_features == 0, &
            "to_noise: x and noise must be (features, samples); the flow takes a context", stat, errmsg)) return
        call finish(self, c_to_noise(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), &
            rows_at(c_loc(x), 0, self%features, self%features), c_null_ptr, into(c_loc(noise), 0, self%features)), stat, errmsg)
    end subroutine

    subroutine from_noise_real32(self, noise, x, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), contiguous, target :: noise(:, :)
        real(real32), intent(out), contiguous, target :: x(:, :)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        if (.not. fits(size(noise, 1, int64) == self%features .and. all(shape(x) == shape(noise)) &
            .and. self%context_features == 0, &
            "from_noise: x and noise must be (features, samples); the flow takes a context", stat, errmsg)) return
        call finish(self, c_from_noise(self%handle, 1_c_int64_t, size(noise, 2, c_int64_t), &
            rows_at(c_loc(noise), 0, self%features, self%features), c_null_ptr, into(c_loc(x), 0, self%features)), stat, errmsg)
    end subroutine

    subroutine log_prob_real32_shared(self, x, log_prob, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), contiguous, target :: x(:, :)
        real(real32), intent(out), contiguous, target :: log_prob(:)
        real(real32), intent(in), contiguous, target :: context(:)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        if (.not. fits(size(x, 1, int64) == self%features .and. size(log_prob) == size(x, 2) .and. size(context, &
            kind=int64) == self%context_features, &
            "log_prob: x must be (features, samples), log_prob (samples); context must be (context_features)", stat, &
            errmsg)) return
        of_context = rows_at(c_loc(context), 0, self%context_features, 0_int64)
        call finish(self, c_log_prob(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), rows_at(c_loc(x), 0, self%features, &
            self%features), &
            c_loc(of_context), into(c_loc(log_prob), 0, 1_int64)), stat, errmsg)
    end subroutine

    subroutine log_prob_and_grad_real32_shared(self, x, log_prob, d_x, context, d_context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), contiguous, target :: x(:, :)
        real(real32), intent(out), contiguous, target :: log_prob(:), d_x(:, :)
        real(real32), intent(in), contiguous, target :: context(:)
        real(real32), intent(out), contiguous, target :: d_context(:)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        type(c_output), target :: of_gradient
        if (.not. fits(size(x, 1, int64) == self%features .and. size(log_prob) == size(x, 2) .and. all(shape(d_x) == shape(x)) &
            .and. size(context, kind=int64) == self%context_features .and. all(shape(d_context) == shape(context)), &
            "x and d_x must be (features, samples), log_prob (samples); context must be (context_features)", &
            stat, errmsg)) return
        of_context = rows_at(c_loc(context), 0, self%context_features, 0_int64)
        of_gradient = into(c_loc(d_context), 0, self%context_features)
        call finish(self, c_log_prob_and_grad(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), &
            rows_at(c_loc(x), 0, self%features, self%features), c_loc(of_context), into(c_loc(log_prob), 0, 1_int64), &
            into(c_loc(d_x), 0, self%features), c_loc(of_gradient)), stat, errmsg)
    end subroutine

    subroutine to_noise_real32_shared(self, x, noise, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), contiguous, target :: x(:, :)
        real(real32), intent(out), contiguous, target :: noise(:, :)
        real(real32), intent(in), contiguous, target :: context(:)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        if (.not. fits(size(x, 1, int64) == self%features .and. all(shape(noise) == shape(x)) .and. size(context, &
            kind=int64) == self%context_features, &
            "to_noise: x and noise must be (features, samples); context must be (context_features)", stat, errmsg)) return
        of_context = rows_at(c_loc(context), 0, self%context_features, 0_int64)
        call finish(self, c_to_noise(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), &
            rows_at(c_loc(x), 0, self%features, self%features), c_loc(of_context), into(c_loc(noise), 0, self%features)), stat, &
            errmsg)
    end subroutine

    subroutine from_noise_real32_shared(self, noise, x, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), contiguous, target :: noise(:, :)
        real(real32), intent(out), contiguous, target :: x(:, :)
        real(real32), intent(in), contiguous, target :: context(:)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        if (.not. fits(size(noise, 1, int64) == self%features .and. all(shape(x) == shape(noise)) .and. size(context, &
            kind=int64) == self%context_features, &
            "from_noise: x and noise must be (features, samples); context must be (context_features)", stat, errmsg)) return
        of_context = rows_at(c_loc(context), 0, self%context_features, 0_int64)
        call finish(self, c_from_noise(self%handle, 1_c_int64_t, size(noise, 2, c_int64_t), &
            rows_at(c_loc(noise), 0, self%features, self%features), c_loc(of_context), into(c_loc(x), 0, self%features)), stat, &
            errmsg)
    end subroutine

    subroutine log_prob_real32_each(self, x, log_prob, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), contiguous, target :: x(:, :)
        real(real32), intent(out), contiguous, target :: log_prob(:)
        real(real32), intent(in), contiguous, target :: context(:, :)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        if (.not. fits(size(x, 1, int64) == self%features .and. size(log_prob) == size(x, 2) .and. size(context, 1, &
            int64) == self%context_features .and. size(context, 2) == size(x, 2), &
            "log_prob: x must be (features, samples), log_prob (samples); context must be (context_features, samples)", stat, &
            errmsg)) return
        of_context = rows_at(c_loc(context), 0, self%context_features, self%context_features)
        call finish(self, c_log_prob(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), rows_at(c_loc(x), 0, self%features, &
            self%features), &
            c_loc(of_context), into(c_loc(log_prob), 0, 1_int64)), stat, errmsg)
    end subroutine

    subroutine log_prob_and_grad_real32_each(self, x, log_prob, d_x, context, d_context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), contiguous, target :: x(:, :)
        real(real32), intent(out), contiguous, target :: log_prob(:), d_x(:, :)
        real(real32), intent(in), contiguous, target :: context(:, :)
        real(real32), intent(out), contiguous, target :: d_context(:, :)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        type(c_output), target :: of_gradient
        if (.not. fits(size(x, 1, int64) == self%features .and. size(log_prob) == size(x, 2) .and. all(shape(d_x) == shape(x)) &
            .and. size(context, 1, int64) == self%context_features .and. size(context, 2) == size(x, 2) &
            .and. all(shape(d_context) == shape(context)), &
            "x and d_x must be (features, samples), log_prob (samples); context must be (context_features, samples)", &
            stat, errmsg)) return
        of_context = rows_at(c_loc(context), 0, self%context_features, self%context_features)
        of_gradient = into(c_loc(d_context), 0, self%context_features)
        call finish(self, c_log_prob_and_grad(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), &
            rows_at(c_loc(x), 0, self%features, self%features), c_loc(of_context), into(c_loc(log_prob), 0, 1_int64), &
            into(c_loc(d_x), 0, self%features), c_loc(of_gradient)), stat, errmsg)
    end subroutine

    subroutine to_noise_real32_each(self, x, noise, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), contiguous, target :: x(:, :)
        real(real32), intent(out), contiguous, target :: noise(:, :)
        real(real32), intent(in), contiguous, target :: context(:, :)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        if (.not. fits(size(x, 1, int64) == self%features .and. all(shape(noise) == shape(x)) .and. size(context, 1, &
            int64) == self%context_features .and. size(context, 2) == size(x, 2), &
            "to_noise: x and noise must be (features, samples); context must be (context_features, samples)", stat, &
            errmsg)) return
        of_context = rows_at(c_loc(context), 0, self%context_features, self%context_features)
        call finish(self, c_to_noise(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), &
            rows_at(c_loc(x), 0, self%features, self%features), c_loc(of_context), into(c_loc(noise), 0, self%features)), stat, &
            errmsg)
    end subroutine

    subroutine from_noise_real32_each(self, noise, x, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(in), contiguous, target :: noise(:, :)
        real(real32), intent(out), contiguous, target :: x(:, :)
        real(real32), intent(in), contiguous, target :: context(:, :)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        if (.not. fits(size(noise, 1, int64) == self%features .and. all(shape(x) == shape(noise)) .and. size(context, 1, &
            int64) == self%context_features .and. size(context, 2) == size(noise, 2), &
            "from_noise: x and noise must be (features, samples); context must be (context_features, samples)", stat, &
            errmsg)) return
        of_context = rows_at(c_loc(context), 0, self%context_features, self%context_features)
        call finish(self, c_from_noise(self%handle, 1_c_int64_t, size(noise, 2, c_int64_t), &
            rows_at(c_loc(noise), 0, self%features, self%features), c_loc(of_context), into(c_loc(x), 0, self%features)), stat, &
            errmsg)
    end subroutine

    subroutine sample_real32(self, samples, seed, offset, context_offset, log_prob, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(out), contiguous, target :: samples(:, :)
        integer(int64), intent(in) :: seed
        integer(int64), intent(in), optional :: offset
        integer(int32), intent(in), optional :: context_offset
        real(real32), intent(out), contiguous, target, optional :: log_prob(:)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_output), target :: of_density
        type(c_ptr) :: density
        integer(c_int64_t) :: first
        integer(c_int32_t) :: first_context
        if (.not. fits(size(samples, 1, int64) == self%features .and. self%context_features == 0, &
            "samples must be (features, samples); the flow takes a context", stat, errmsg)) return
        density = c_null_ptr
        if (present(log_prob)) then
            if (.not. fits(size(log_prob, kind=int64) * self%features == size(samples, kind=int64), &
                "sample: log_prob must have a number for each sample", stat, errmsg)) return
            of_density = into(c_loc(log_prob), 0, 1_int64)
            density = c_loc(of_density)
        end if
        first = 0
        if (present(offset)) first = int(offset, c_int64_t)
        first_context = 0
        if (present(context_offset)) first_context = int(context_offset, c_int32_t)
        call finish(self, c_sample(self%handle, 1_c_int64_t, size(samples, 2, c_int64_t), c_null_ptr, &
            int(seed, c_int64_t), first, first_context, into(c_loc(samples), 0, self%features), density), stat, errmsg)
    end subroutine

    subroutine sample_real32_shared(self, samples, context, seed, offset, context_offset, log_prob, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(out), contiguous, target :: samples(:, :)
        real(real32), intent(in), contiguous, target :: context(:)
        integer(int64), intent(in) :: seed
        integer(int64), intent(in), optional :: offset
        integer(int32), intent(in), optional :: context_offset
        real(real32), intent(out), contiguous, target, optional :: log_prob(:)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        type(c_output), target :: of_density
        type(c_ptr) :: density
        integer(c_int64_t) :: first
        integer(c_int32_t) :: first_context
        if (.not. fits(size(samples, 1, int64) == self%features .and. size(context, kind=int64) == self%context_features, &
            "samples must be (features, samples); context must be (context_features)", stat, errmsg)) return
        density = c_null_ptr
        if (present(log_prob)) then
            if (.not. fits(size(log_prob, kind=int64) * self%features == size(samples, kind=int64), &
                "sample: log_prob must have a number for each sample", stat, errmsg)) return
            of_density = into(c_loc(log_prob), 0, 1_int64)
            density = c_loc(of_density)
        end if
        first = 0
        if (present(offset)) first = int(offset, c_int64_t)
        first_context = 0
        if (present(context_offset)) first_context = int(context_offset, c_int32_t)
        of_context = rows_at(c_loc(context), 0, self%context_features, 0_int64)
        of_context%group_stride = int(self%context_features, c_int64_t)
        call finish(self, c_sample(self%handle, 1_c_int64_t, size(samples, 2, c_int64_t), c_loc(of_context), &
            int(seed, c_int64_t), first, first_context, into(c_loc(samples), 0, self%features), density), stat, errmsg)
    end subroutine

    subroutine sample_real32_each(self, samples, context, seed, offset, context_offset, log_prob, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real32), intent(out), contiguous, target :: samples(:, :, :)
        real(real32), intent(in), contiguous, target :: context(:, :)
        integer(int64), intent(in) :: seed
        integer(int64), intent(in), optional :: offset
        integer(int32), intent(in), optional :: context_offset
        real(real32), intent(out), contiguous, target, optional :: log_prob(:, :)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        type(c_output), target :: of_density
        type(c_ptr) :: density
        integer(c_int64_t) :: first
        integer(c_int32_t) :: first_context
        if (.not. fits(size(samples, 1, int64) == self%features .and. size(context, 1, int64) == self%context_features &
            .and. size(context, 2) == size(samples, 3), &
            "samples must be (features, samples); or (features, samples, contexts)", stat, errmsg)) return
        density = c_null_ptr
        if (present(log_prob)) then
            if (.not. fits(size(log_prob, kind=int64) * self%features == size(samples, kind=int64), &
                "sample: log_prob must have a number for each sample", stat, errmsg)) return
            of_density = into(c_loc(log_prob), 0, 1_int64)
            density = c_loc(of_density)
        end if
        first = 0
        if (present(offset)) first = int(offset, c_int64_t)
        first_context = 0
        if (present(context_offset)) first_context = int(context_offset, c_int32_t)
        of_context = rows_at(c_loc(context), 0, self%context_features, 0_int64)
        of_context%group_stride = int(self%context_features, c_int64_t)
        call finish(self, c_sample(self%handle, size(samples, 3, c_int64_t), size(samples, 2, c_int64_t), c_loc(of_context), &
            int(seed, c_int64_t), first, first_context, into(c_loc(samples), 0, self%features), density), stat, errmsg)
    end subroutine

    subroutine log_prob_real64(self, x, log_prob, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), contiguous, target :: x(:, :)
        real(real64), intent(out), contiguous, target :: log_prob(:)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        if (.not. fits(size(x, 1, int64) == self%features .and. size(log_prob) == size(x, 2) .and. self%context_features == 0, &
            "log_prob: x must be (features, samples), log_prob (samples); the flow takes a context", stat, errmsg)) return
        call finish(self, c_log_prob(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), rows_at(c_loc(x), 1, self%features, &
            self%features), &
            c_null_ptr, into(c_loc(log_prob), 1, 1_int64)), stat, errmsg)
    end subroutine

    subroutine log_prob_and_grad_real64(self, x, log_prob, d_x, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), contiguous, target :: x(:, :)
        real(real64), intent(out), contiguous, target :: log_prob(:), d_x(:, :)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        if (.not. fits(size(x, 1, int64) == self%features .and. size(log_prob) == size(x, 2) .and. all(shape(d_x) == shape(x)) &
            .and. self%context_features == 0, &
            "x and d_x must be (features, samples), log_prob (samples); the flow takes a context", &
            stat, errmsg)) return
        call finish(self, c_log_prob_and_grad(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), &
            rows_at(c_loc(x), 1, self%features, self%features), c_null_ptr, into(c_loc(log_prob), 1, 1_int64), &
            into(c_loc(d_x), 1, self%features), c_null_ptr), stat, errmsg)
    end subroutine

    subroutine to_noise_real64(self, x, noise, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), contiguous, target :: x(:, :)
        real(real64), intent(out), contiguous, target :: noise(:, :)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        if (.not. fits(size(x, 1, int64) == self%features .and. all(shape(noise) == shape(x)) .and. self%context_features == 0, &
            "to_noise: x and noise must be (features, samples); the flow takes a context", stat, errmsg)) return
        call finish(self, c_to_noise(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), &
            rows_at(c_loc(x), 1, self%features, self%features), c_null_ptr, into(c_loc(noise), 1, self%features)), stat, errmsg)
    end subroutine

    subroutine from_noise_real64(self, noise, x, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), contiguous, target :: noise(:, :)
        real(real64), intent(out), contiguous, target :: x(:, :)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        if (.not. fits(size(noise, 1, int64) == self%features .and. all(shape(x) == shape(noise)) &
            .and. self%context_features == 0, &
            "from_noise: x and noise must be (features, samples); the flow takes a context", stat, errmsg)) return
        call finish(self, c_from_noise(self%handle, 1_c_int64_t, size(noise, 2, c_int64_t), &
            rows_at(c_loc(noise), 1, self%features, self%features), c_null_ptr, into(c_loc(x), 1, self%features)), stat, errmsg)
    end subroutine

    subroutine log_prob_real64_shared(self, x, log_prob, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), contiguous, target :: x(:, :)
        real(real64), intent(out), contiguous, target :: log_prob(:)
        real(real64), intent(in), contiguous, target :: context(:)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        if (.not. fits(size(x, 1, int64) == self%features .and. size(log_prob) == size(x, 2) .and. size(context, &
            kind=int64) == self%context_features, &
            "log_prob: x must be (features, samples), log_prob (samples); context must be (context_features)", stat, &
            errmsg)) return
        of_context = rows_at(c_loc(context), 1, self%context_features, 0_int64)
        call finish(self, c_log_prob(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), rows_at(c_loc(x), 1, self%features, &
            self%features), &
            c_loc(of_context), into(c_loc(log_prob), 1, 1_int64)), stat, errmsg)
    end subroutine

    subroutine log_prob_and_grad_real64_shared(self, x, log_prob, d_x, context, d_context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), contiguous, target :: x(:, :)
        real(real64), intent(out), contiguous, target :: log_prob(:), d_x(:, :)
        real(real64), intent(in), contiguous, target :: context(:)
        real(real64), intent(out), contiguous, target :: d_context(:)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        type(c_output), target :: of_gradient
        if (.not. fits(size(x, 1, int64) == self%features .and. size(log_prob) == size(x, 2) .and. all(shape(d_x) == shape(x)) &
            .and. size(context, kind=int64) == self%context_features .and. all(shape(d_context) == shape(context)), &
            "x and d_x must be (features, samples), log_prob (samples); context must be (context_features)", &
            stat, errmsg)) return
        of_context = rows_at(c_loc(context), 1, self%context_features, 0_int64)
        of_gradient = into(c_loc(d_context), 1, self%context_features)
        call finish(self, c_log_prob_and_grad(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), &
            rows_at(c_loc(x), 1, self%features, self%features), c_loc(of_context), into(c_loc(log_prob), 1, 1_int64), &
            into(c_loc(d_x), 1, self%features), c_loc(of_gradient)), stat, errmsg)
    end subroutine

    subroutine to_noise_real64_shared(self, x, noise, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), contiguous, target :: x(:, :)
        real(real64), intent(out), contiguous, target :: noise(:, :)
        real(real64), intent(in), contiguous, target :: context(:)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        if (.not. fits(size(x, 1, int64) == self%features .and. all(shape(noise) == shape(x)) .and. size(context, &
            kind=int64) == self%context_features, &
            "to_noise: x and noise must be (features, samples); context must be (context_features)", stat, errmsg)) return
        of_context = rows_at(c_loc(context), 1, self%context_features, 0_int64)
        call finish(self, c_to_noise(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), &
            rows_at(c_loc(x), 1, self%features, self%features), c_loc(of_context), into(c_loc(noise), 1, self%features)), stat, &
            errmsg)
    end subroutine

    subroutine from_noise_real64_shared(self, noise, x, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), contiguous, target :: noise(:, :)
        real(real64), intent(out), contiguous, target :: x(:, :)
        real(real64), intent(in), contiguous, target :: context(:)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        if (.not. fits(size(noise, 1, int64) == self%features .and. all(shape(x) == shape(noise)) .and. size(context, &
            kind=int64) == self%context_features, &
            "from_noise: x and noise must be (features, samples); context must be (context_features)", stat, errmsg)) return
        of_context = rows_at(c_loc(context), 1, self%context_features, 0_int64)
        call finish(self, c_from_noise(self%handle, 1_c_int64_t, size(noise, 2, c_int64_t), &
            rows_at(c_loc(noise), 1, self%features, self%features), c_loc(of_context), into(c_loc(x), 1, self%features)), stat, &
            errmsg)
    end subroutine

    subroutine log_prob_real64_each(self, x, log_prob, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), contiguous, target :: x(:, :)
        real(real64), intent(out), contiguous, target :: log_prob(:)
        real(real64), intent(in), contiguous, target :: context(:, :)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        if (.not. fits(size(x, 1, int64) == self%features .and. size(log_prob) == size(x, 2) .and. size(context, 1, &
            int64) == self%context_features .and. size(context, 2) == size(x, 2), &
            "log_prob: x must be (features, samples), log_prob (samples); context must be (context_features, samples)", stat, &
            errmsg)) return
        of_context = rows_at(c_loc(context), 1, self%context_features, self%context_features)
        call finish(self, c_log_prob(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), rows_at(c_loc(x), 1, self%features, &
            self%features), &
            c_loc(of_context), into(c_loc(log_prob), 1, 1_int64)), stat, errmsg)
    end subroutine

    subroutine log_prob_and_grad_real64_each(self, x, log_prob, d_x, context, d_context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), contiguous, target :: x(:, :)
        real(real64), intent(out), contiguous, target :: log_prob(:), d_x(:, :)
        real(real64), intent(in), contiguous, target :: context(:, :)
        real(real64), intent(out), contiguous, target :: d_context(:, :)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        type(c_output), target :: of_gradient
        if (.not. fits(size(x, 1, int64) == self%features .and. size(log_prob) == size(x, 2) .and. all(shape(d_x) == shape(x)) &
            .and. size(context, 1, int64) == self%context_features .and. size(context, 2) == size(x, 2) &
            .and. all(shape(d_context) == shape(context)), &
            "x and d_x must be (features, samples), log_prob (samples); context must be (context_features, samples)", &
            stat, errmsg)) return
        of_context = rows_at(c_loc(context), 1, self%context_features, self%context_features)
        of_gradient = into(c_loc(d_context), 1, self%context_features)
        call finish(self, c_log_prob_and_grad(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), &
            rows_at(c_loc(x), 1, self%features, self%features), c_loc(of_context), into(c_loc(log_prob), 1, 1_int64), &
            into(c_loc(d_x), 1, self%features), c_loc(of_gradient)), stat, errmsg)
    end subroutine

    subroutine to_noise_real64_each(self, x, noise, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), contiguous, target :: x(:, :)
        real(real64), intent(out), contiguous, target :: noise(:, :)
        real(real64), intent(in), contiguous, target :: context(:, :)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        if (.not. fits(size(x, 1, int64) == self%features .and. all(shape(noise) == shape(x)) .and. size(context, 1, &
            int64) == self%context_features .and. size(context, 2) == size(x, 2), &
            "to_noise: x and noise must be (features, samples); context must be (context_features, samples)", stat, &
            errmsg)) return
        of_context = rows_at(c_loc(context), 1, self%context_features, self%context_features)
        call finish(self, c_to_noise(self%handle, 1_c_int64_t, size(x, 2, c_int64_t), &
            rows_at(c_loc(x), 1, self%features, self%features), c_loc(of_context), into(c_loc(noise), 1, self%features)), stat, &
            errmsg)
    end subroutine

    subroutine from_noise_real64_each(self, noise, x, context, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(in), contiguous, target :: noise(:, :)
        real(real64), intent(out), contiguous, target :: x(:, :)
        real(real64), intent(in), contiguous, target :: context(:, :)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        if (.not. fits(size(noise, 1, int64) == self%features .and. all(shape(x) == shape(noise)) .and. size(context, 1, &
            int64) == self%context_features .and. size(context, 2) == size(noise, 2), &
            "from_noise: x and noise must be (features, samples); context must be (context_features, samples)", stat, &
            errmsg)) return
        of_context = rows_at(c_loc(context), 1, self%context_features, self%context_features)
        call finish(self, c_from_noise(self%handle, 1_c_int64_t, size(noise, 2, c_int64_t), &
            rows_at(c_loc(noise), 1, self%features, self%features), c_loc(of_context), into(c_loc(x), 1, self%features)), stat, &
            errmsg)
    end subroutine

    subroutine sample_real64(self, samples, seed, offset, context_offset, log_prob, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(out), contiguous, target :: samples(:, :)
        integer(int64), intent(in) :: seed
        integer(int64), intent(in), optional :: offset
        integer(int32), intent(in), optional :: context_offset
        real(real64), intent(out), contiguous, target, optional :: log_prob(:)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_output), target :: of_density
        type(c_ptr) :: density
        integer(c_int64_t) :: first
        integer(c_int32_t) :: first_context
        if (.not. fits(size(samples, 1, int64) == self%features .and. self%context_features == 0, &
            "samples must be (features, samples); the flow takes a context", stat, errmsg)) return
        density = c_null_ptr
        if (present(log_prob)) then
            if (.not. fits(size(log_prob, kind=int64) * self%features == size(samples, kind=int64), &
                "sample: log_prob must have a number for each sample", stat, errmsg)) return
            of_density = into(c_loc(log_prob), 1, 1_int64)
            density = c_loc(of_density)
        end if
        first = 0
        if (present(offset)) first = int(offset, c_int64_t)
        first_context = 0
        if (present(context_offset)) first_context = int(context_offset, c_int32_t)
        call finish(self, c_sample(self%handle, 1_c_int64_t, size(samples, 2, c_int64_t), c_null_ptr, &
            int(seed, c_int64_t), first, first_context, into(c_loc(samples), 1, self%features), density), stat, errmsg)
    end subroutine

    subroutine sample_real64_shared(self, samples, context, seed, offset, context_offset, log_prob, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(out), contiguous, target :: samples(:, :)
        real(real64), intent(in), contiguous, target :: context(:)
        integer(int64), intent(in) :: seed
        integer(int64), intent(in), optional :: offset
        integer(int32), intent(in), optional :: context_offset
        real(real64), intent(out), contiguous, target, optional :: log_prob(:)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        type(c_output), target :: of_density
        type(c_ptr) :: density
        integer(c_int64_t) :: first
        integer(c_int32_t) :: first_context
        if (.not. fits(size(samples, 1, int64) == self%features .and. size(context, kind=int64) == self%context_features, &
            "samples must be (features, samples); context must be (context_features)", stat, errmsg)) return
        density = c_null_ptr
        if (present(log_prob)) then
            if (.not. fits(size(log_prob, kind=int64) * self%features == size(samples, kind=int64), &
                "sample: log_prob must have a number for each sample", stat, errmsg)) return
            of_density = into(c_loc(log_prob), 1, 1_int64)
            density = c_loc(of_density)
        end if
        first = 0
        if (present(offset)) first = int(offset, c_int64_t)
        first_context = 0
        if (present(context_offset)) first_context = int(context_offset, c_int32_t)
        of_context = rows_at(c_loc(context), 1, self%context_features, 0_int64)
        of_context%group_stride = int(self%context_features, c_int64_t)
        call finish(self, c_sample(self%handle, 1_c_int64_t, size(samples, 2, c_int64_t), c_loc(of_context), &
            int(seed, c_int64_t), first, first_context, into(c_loc(samples), 1, self%features), density), stat, errmsg)
    end subroutine

    subroutine sample_real64_each(self, samples, context, seed, offset, context_offset, log_prob, stat, errmsg)
        class(flow_evaluator), intent(inout) :: self
        real(real64), intent(out), contiguous, target :: samples(:, :, :)
        real(real64), intent(in), contiguous, target :: context(:, :)
        integer(int64), intent(in) :: seed
        integer(int64), intent(in), optional :: offset
        integer(int32), intent(in), optional :: context_offset
        real(real64), intent(out), contiguous, target, optional :: log_prob(:, :)
        integer, intent(out), optional :: stat
        character(len=*), intent(inout), optional :: errmsg
        type(c_array), target :: of_context
        type(c_output), target :: of_density
        type(c_ptr) :: density
        integer(c_int64_t) :: first
        integer(c_int32_t) :: first_context
        if (.not. fits(size(samples, 1, int64) == self%features .and. size(context, 1, int64) == self%context_features &
            .and. size(context, 2) == size(samples, 3), &
            "samples must be (features, samples); or (features, samples, contexts)", stat, errmsg)) return
        density = c_null_ptr
        if (present(log_prob)) then
            if (.not. fits(size(log_prob, kind=int64) * self%features == size(samples, kind=int64), &
                "sample: log_prob must have a number for each sample", stat, errmsg)) return
            of_density = into(c_loc(log_prob), 1, 1_int64)
            density = c_loc(of_density)
        end if
        first = 0
        if (present(offset)) first = int(offset, c_int64_t)
        first_context = 0
        if (present(context_offset)) first_context = int(context_offset, c_int32_t)
        of_context = rows_at(c_loc(context), 1, self%context_features, 0_int64)
        of_context%group_stride = int(self%context_features, c_int64_t)
        call finish(self, c_sample(self%handle, size(samples, 3, c_int64_t), size(samples, 2, c_int64_t), c_loc(of_context), &
            int(seed, c_int64_t), first, first_context, into(c_loc(samples), 1, self%features), density), stat, errmsg)
    end subroutine
end module
